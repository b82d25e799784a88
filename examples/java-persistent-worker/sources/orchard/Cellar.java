package orchard;

import java.util.LinkedList;
import java.util.List;
import java.util.ListIterator;
import java.util.Optional;

/** Crates on shelves, the oldest first out. */
public class Cellar {
  private static final class Crate {
    final Fruit fruit;
    final int month;

    Crate(Fruit fruit, int month) {
      this.fruit = fruit;
      this.month = month;
    }
  }

  private final List<Crate> crates = new LinkedList<>();

  public void store(Fruit fruit, int month) {
    if (!fruit.keepsInWinter()) {
      throw new IllegalArgumentException(fruit + " does not keep");
    }
    crates.add(new Crate(fruit, month));
  }

  public int throwAwayOlderThan(int month) {
    int before = crates.size();
    for (ListIterator<Crate> each = crates.listIterator(); each.hasNext(); ) {
      if (each.next().month < month) {
        each.remove();
      }
    }
    return before - crates.size();
  }

  public Optional<Integer> oldest(Fruit fruit) {
    return crates.stream().filter(crate -> crate.fruit == fruit).map(crate -> crate.month).min(Integer::compare);
  }
}
