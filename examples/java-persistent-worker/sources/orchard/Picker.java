package orchard;

import java.util.concurrent.Callable;
import java.util.concurrent.locks.ReentrantLock;
import java.util.function.Consumer;

/** Picks a tree with a borrowed ladder. */
public class Picker implements Callable<Integer> {
  private final ReentrantLock ladders;
  private final Tree tree;
  private final Consumer<? super Fruit> sink;

  public Picker(ReentrantLock ladders, Tree tree, Consumer<? super Fruit> sink) {
    this.ladders = ladders;
    this.tree = tree;
    this.sink = sink;
  }

  @Override
  public Integer call() {
    int picked = 0;
    try (Ladder ladder = Ladder.borrow(ladders)) {
      for (int branch = 0; branch <= tree.row() % 5; branch++) {
        sink.accept(tree.fruit());
        picked++;
      }
      assert Ladder.inUse() > 0 : ladder;
    }
    return picked;
  }
}
