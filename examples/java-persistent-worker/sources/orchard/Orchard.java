package orchard;

import java.util.Collections;
import java.util.EnumMap;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.NavigableSet;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/** All trees, in rows. */
public class Orchard implements Iterable<Tree> {
  private final NavigableSet<Tree> trees = new TreeSet<>();

  public boolean plant(Tree tree) {
    return trees.add(tree);
  }

  public int size() {
    return trees.size();
  }

  public Stream<Tree> stream() {
    return trees.stream();
  }

  public Map<Fruit, Long> census() {
    Map<Fruit, Long> counts = new EnumMap<>(Fruit.class);
    for (Tree tree : this) {
      counts.merge(tree.fruit(), 1L, Long::sum);
    }
    return counts;
  }

  public List<Tree> row(int number) {
    return stream().filter(tree -> tree.row() == number).collect(Collectors.toList());
  }

  @Override
  public Iterator<Tree> iterator() {
    return Collections.unmodifiableSet(trees).iterator();
  }
}
