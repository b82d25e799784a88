package orchard;

import java.util.ArrayDeque;
import java.util.Deque;
import java.util.Optional;

/** Collects fruit up to a weight. */
public class Basket<T extends Fruit> {
  private final int capacityGrams;
  private final Deque<T> content = new ArrayDeque<>();
  private int grams;

  public Basket(int capacityGrams) {
    this.capacityGrams = capacityGrams;
  }

  public boolean offer(T fruit) {
    if (grams + fruit.grams() > capacityGrams) {
      return false;
    }
    content.addLast(fruit);
    grams += fruit.grams();
    return true;
  }

  public Optional<T> take() {
    T fruit = content.pollFirst();
    if (fruit != null) {
      grams -= fruit.grams();
    }
    return Optional.ofNullable(fruit);
  }

  public double fill() {
    return capacityGrams == 0 ? 1.0 : (double) grams / capacityGrams;
  }
}
