package orchard;

import java.time.LocalDate;
import java.time.Month;
import java.util.DoubleSummaryStatistics;
import java.util.Map;
import java.util.NavigableMap;
import java.util.OptionalInt;
import java.util.TreeMap;
import java.util.stream.Collectors;

/** The weather of many days. */
public class Diary {
  private final NavigableMap<LocalDate, Weather> days = new TreeMap<>();

  public void note(LocalDate day, Weather weather) {
    days.put(day, weather);
  }

  public OptionalInt lastFrost(int year) {
    return days.descendingMap().entrySet().stream()
        .filter(entry -> entry.getKey().getYear() == year && entry.getKey().getMonthValue() < 7)
        .filter(entry -> entry.getValue().frost())
        .mapToInt(entry -> entry.getKey().getDayOfYear())
        .findFirst();
  }

  public double growthBetween(LocalDate from, LocalDate to) {
    return days.subMap(from, true, to, false).values().stream().mapToDouble(Weather::growth).sum();
  }

  public Map<Month, DoubleSummaryStatistics> growthByMonth() {
    return days.entrySet().stream()
        .collect(
            Collectors.groupingBy(
                entry -> entry.getKey().getMonth(),
                TreeMap::new,
                Collectors.summarizingDouble(entry -> entry.getValue().growth())));
  }
}
