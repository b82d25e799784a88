package orchard;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.SortedMap;
import java.util.TreeMap;

/** The order in which a picker visits trees: row by row, every other row backwards. */
public final class Walk {
  private Walk() {}

  public static List<Tree> through(Orchard orchard) {
    SortedMap<Integer, List<Tree>> rows = new TreeMap<>();
    for (Tree tree : orchard) {
      rows.computeIfAbsent(tree.row(), key -> new ArrayList<>()).add(tree);
    }
    List<Tree> order = new ArrayList<>(orchard.size());
    boolean backwards = false;
    for (List<Tree> row : rows.values()) {
      if (backwards) {
        Collections.reverse(row);
      }
      order.addAll(row);
      backwards = !backwards;
    }
    return order;
  }

  public static int length(List<Tree> order) {
    int steps = 0;
    for (int i = 1; i < order.size(); i++) {
      Tree from = order.get(i - 1);
      Tree to = order.get(i);
      steps += Math.abs(from.row() - to.row()) + Math.abs(from.column() - to.column());
    }
    return steps;
  }
}
