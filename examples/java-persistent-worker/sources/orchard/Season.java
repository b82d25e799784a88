package orchard;

import java.util.EnumSet;
import java.util.Set;

/** The four seasons and the months in them. */
public enum Season {
  WINTER(12, 1, 2),
  SPRING(3, 4, 5),
  SUMMER(6, 7, 8),
  AUTUMN(9, 10, 11);

  private final Set<Integer> months;

  Season(Integer... months) {
    this.months = Set.of(months);
  }

  public static Season of(int month) {
    for (Season season : values()) {
      if (season.months.contains(month)) {
        return season;
      }
    }
    throw new IllegalArgumentException("month " + month);
  }

  public Season next() {
    return values()[(ordinal() + 1) % values().length];
  }

  public Set<Fruit> ripening() {
    Set<Fruit> ripe = EnumSet.noneOf(Fruit.class);
    for (Fruit fruit : Fruit.values()) {
      if (of(fruit.ripeMonth()) == this) {
        ripe.add(fruit);
      }
    }
    return ripe;
  }
}
