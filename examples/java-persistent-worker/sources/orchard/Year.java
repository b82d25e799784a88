package orchard;

import java.util.Locale;
import java.util.Set;

/** Puts the parts together: a year in the orchard, told as text. */
public final class Year {
  private final Orchard orchard;
  private final PriceList prices;

  public Year(Orchard orchard, PriceList prices) {
    this.orchard = orchard;
    this.prices = prices;
  }

  public String tell(int year) {
    StringBuilder story = new StringBuilder("In ").append(year).append(":\n");
    for (Season season : Season.values()) {
      story.append(season.name().charAt(0)).append(season.name().substring(1).toLowerCase(Locale.ROOT));
      Set<Fruit> ripe = season.ripening();
      story.append(ripe.isEmpty() ? " brings nothing" : " brings " + ripe).append('\n');
    }
    Invoice invoice = new Invoice(prices);
    for (Fruit fruit : Fruit.values()) {
      double grams =
          Query.fruit(fruit).in(orchard).stream().mapToDouble(tree -> Harvest.expectedGrams(tree, year)).sum();
      if (grams >= 1) {
        invoice.add(fruit, (int) grams);
      }
    }
    return story.append(invoice.text()).append(MapSheet.draw(orchard)).toString();
  }
}
