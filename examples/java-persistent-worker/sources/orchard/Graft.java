package orchard;

import java.util.ArrayList;
import java.util.List;
import java.util.function.BiFunction;
import java.util.function.Predicate;

/** A tree of varieties: which was grafted on which. */
public final class Graft<T> {
  private final T variety;
  private final List<Graft<T>> scions = new ArrayList<>();

  public Graft(T variety) {
    this.variety = variety;
  }

  public Graft<T> add(T scion) {
    Graft<T> child = new Graft<>(scion);
    scions.add(child);
    return child;
  }

  public <R> R fold(BiFunction<? super T, ? super List<R>, ? extends R> function) {
    List<R> results = new ArrayList<>(scions.size());
    for (Graft<T> scion : scions) {
      results.add(scion.fold(function));
    }
    return function.apply(variety, results);
  }

  public int depth() {
    return this.<Integer>fold((ignored, depths) -> 1 + depths.stream().max(Integer::compare).orElse(0));
  }

  public boolean any(Predicate<? super T> test) {
    return test.test(variety) || scions.stream().anyMatch(scion -> scion.any(test));
  }
}
