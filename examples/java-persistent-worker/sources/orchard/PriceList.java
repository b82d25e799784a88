package orchard;

import java.util.Collections;
import java.util.EnumMap;
import java.util.Map;

/** What a kilogram costs. */
public class PriceList {
  private final Map<Fruit, Price> perKilogram;

  public PriceList(Map<Fruit, Price> perKilogram) {
    this.perKilogram = new EnumMap<>(perKilogram);
  }

  public Price of(Fruit fruit, int grams) {
    return perKilogram.getOrDefault(fruit, Price.ZERO).times(grams / 1000.0);
  }

  public Fruit dearest() {
    return Collections.max(perKilogram.entrySet(), Map.Entry.comparingByValue()).getKey();
  }

  public PriceList raisedBy(double percent) {
    Map<Fruit, Price> raised = new EnumMap<>(Fruit.class);
    perKilogram.forEach((fruit, price) -> raised.put(fruit, price.times(1 + percent / 100)));
    return new PriceList(raised);
  }
}
