package orchard;

import java.util.Arrays;
import java.util.Optional;

/** What grows, when it is ripe and what it weighs. */
public enum Fruit {
  APPLE(9, 180),
  CHERRY(6, 8) {
    @Override
    public boolean keepsInWinter() {
      return false;
    }
  },
  PEAR(8, 170),
  PLUM(8, 60) {
    @Override
    public boolean keepsInWinter() {
      return false;
    }
  };

  private final int ripeMonth;
  private final int grams;

  Fruit(int ripeMonth, int grams) {
    this.ripeMonth = ripeMonth;
    this.grams = grams;
  }

  public int ripeMonth() {
    return ripeMonth;
  }

  public int grams() {
    return grams;
  }

  public boolean keepsInWinter() {
    return true;
  }

  public static Optional<Fruit> named(String name) {
    return Arrays.stream(values()).filter(fruit -> fruit.name().equalsIgnoreCase(name)).findFirst();
  }
}
