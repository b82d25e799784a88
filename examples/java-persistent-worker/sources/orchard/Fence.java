package orchard;

import java.util.ArrayList;
import java.util.Collections;
import java.util.Comparator;
import java.util.List;

/** The convex fence around all trees. */
public final class Fence {
  private Fence() {}

  public static List<int[]> around(List<int[]> points) {
    List<int[]> sorted = new ArrayList<>(points);
    sorted.sort(Comparator.<int[]>comparingInt(p -> p[0]).thenComparingInt(p -> p[1]));
    if (sorted.size() < 3) {
      return sorted;
    }
    List<int[]> hull = half(sorted);
    Collections.reverse(sorted);
    hull.addAll(half(sorted));
    return hull;
  }

  private static List<int[]> half(List<int[]> sorted) {
    List<int[]> chain = new ArrayList<>();
    for (int[] point : sorted) {
      while (chain.size() > 1 && turn(chain.get(chain.size() - 2), chain.get(chain.size() - 1), point) <= 0) {
        chain.remove(chain.size() - 1);
      }
      chain.add(point);
    }
    chain.remove(chain.size() - 1);
    return chain;
  }

  private static long turn(int[] a, int[] b, int[] c) {
    return (long) (b[0] - a[0]) * (c[1] - a[1]) - (long) (b[1] - a[1]) * (c[0] - a[0]);
  }
}
