package orchard;

import java.util.ArrayDeque;
import java.util.Collections;
import java.util.Deque;
import java.util.HashMap;
import java.util.LinkedHashSet;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;

/** Which varieties can pollinate which: a relation and its closure. */
public final class Pollination {
  private final Map<String, Set<String>> donors = new HashMap<>();

  public void allow(String donor, String receiver) {
    donors.computeIfAbsent(receiver, key -> new TreeSet<>()).add(donor);
  }

  public Set<String> donorsOf(String receiver) {
    return Collections.unmodifiableSet(donors.getOrDefault(receiver, Collections.emptySet()));
  }

  public Set<String> reachableFrom(String receiver) {
    Set<String> seen = new LinkedHashSet<>();
    Deque<String> open = new ArrayDeque<>(donorsOf(receiver));
    while (!open.isEmpty()) {
      String next = open.pop();
      if (seen.add(next)) {
        donorsOf(next).forEach(open::push);
      }
    }
    return seen;
  }
}
