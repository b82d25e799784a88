package orchard;

import java.util.ArrayList;
import java.util.List;
import java.util.StringJoiner;

/** Lines and their sum. */
public class Invoice {
  /** One line of an invoice. */
  public final class Line {
    private final Fruit fruit;
    private final int grams;

    private Line(Fruit fruit, int grams) {
      this.fruit = fruit;
      this.grams = grams;
    }

    public Price price() {
      return prices.of(fruit, grams);
    }
  }

  private final PriceList prices;
  private final List<Line> lines = new ArrayList<>();

  public Invoice(PriceList prices) {
    this.prices = prices;
  }

  public Line add(Fruit fruit, int grams) {
    Line line = new Line(fruit, grams);
    lines.add(line);
    return line;
  }

  public Price total() {
    return lines.stream().map(Line::price).reduce(Price.ZERO, Price::plus);
  }

  public String text() {
    StringJoiner text = new StringJoiner("\n", "", "\n");
    for (Line line : lines) {
      text.add(line.fruit + " " + line.grams + " g: " + line.price());
    }
    return text.add("total: " + total()).toString();
  }
}
