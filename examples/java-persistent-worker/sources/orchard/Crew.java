package orchard;

import java.util.List;
import java.util.Queue;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.locks.ReentrantLock;
import java.util.stream.Collectors;

/** Several pickers at work. */
public final class Crew {
  private final int hands;

  public Crew(int hands) {
    this.hands = hands;
  }

  public int pickAll(Orchard orchard) throws InterruptedException {
    ExecutorService pool = Executors.newFixedThreadPool(hands);
    ReentrantLock ladders = new ReentrantLock(true);
    Queue<Fruit> crates = new ConcurrentLinkedQueue<>();
    try {
      List<Picker> work =
          orchard.stream().map(tree -> new Picker(ladders, tree, crates::add)).collect(Collectors.toList());
      int total = 0;
      for (Future<Integer> result : pool.invokeAll(work)) {
        total += result.get();
      }
      return total;
    } catch (ExecutionException failed) {
      throw new IllegalStateException("a picker failed", failed.getCause());
    } finally {
      pool.shutdown();
    }
  }
}
