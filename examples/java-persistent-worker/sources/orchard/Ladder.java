package orchard;

import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.locks.ReentrantLock;

/** A shared thing that one picker holds at a time. */
public final class Ladder implements AutoCloseable {
  private static final AtomicInteger IN_USE = new AtomicInteger();
  private final ReentrantLock lock;

  private Ladder(ReentrantLock lock) {
    this.lock = lock;
    IN_USE.incrementAndGet();
  }

  public static Ladder borrow(ReentrantLock lock) {
    lock.lock();
    return new Ladder(lock);
  }

  public static int inUse() {
    return IN_USE.get();
  }

  @Override
  public void close() {
    IN_USE.decrementAndGet();
    lock.unlock();
  }
}
