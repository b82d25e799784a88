package orchard;

import java.util.ArrayList;
import java.util.List;
import java.util.SortedMap;
import java.util.TreeMap;
import java.util.function.Function;
import java.util.function.Predicate;
import java.util.stream.Collectors;

/** Small searches over trees, put together from parts. */
@FunctionalInterface
public interface Query extends Predicate<Tree> {
  static Query fruit(Fruit fruit) {
    return tree -> tree.fruit() == fruit;
  }

  static Query olderThan(int years, int now) {
    return tree -> tree.ageIn(now) > years;
  }

  default Query and(Query other) {
    return tree -> test(tree) && other.test(tree);
  }

  default Query or(Query other) {
    return tree -> test(tree) || other.test(tree);
  }

  default List<Tree> in(Orchard orchard) {
    return orchard.stream().filter(this).sorted().collect(Collectors.toCollection(ArrayList::new));
  }

  static <K extends Comparable<K>> SortedMap<K, List<Tree>> grouped(
      Orchard orchard, Function<? super Tree, ? extends K> key) {
    SortedMap<K, List<Tree>> groups = new TreeMap<>();
    orchard.forEach(tree -> groups.computeIfAbsent(key.apply(tree), ignored -> new ArrayList<>()).add(tree));
    return groups;
  }
}
