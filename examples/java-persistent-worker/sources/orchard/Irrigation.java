package orchard;

import java.util.Comparator;
import java.util.PriorityQueue;
import java.util.stream.IntStream;

/** Opens valves so that every row gets its water in as few minutes as possible. */
public final class Irrigation {
  private final int[] litresByRow;
  private final int litresPerMinute;

  public Irrigation(int litresPerMinute, int... litresByRow) {
    this.litresPerMinute = litresPerMinute;
    this.litresByRow = litresByRow.clone();
  }

  public int minutes(int valves) {
    PriorityQueue<Integer> busyUntil = new PriorityQueue<>();
    for (int i = 0; i < valves; i++) {
      busyUntil.add(0);
    }
    int last = 0;
    for (int litres : sortedDescending()) {
      int start = busyUntil.remove();
      int end = start + (litres + litresPerMinute - 1) / litresPerMinute;
      busyUntil.add(end);
      last = Math.max(last, end);
    }
    return last;
  }

  private int[] sortedDescending() {
    return IntStream.of(litresByRow).boxed().sorted(Comparator.reverseOrder()).mapToInt(i -> i).toArray();
  }
}
