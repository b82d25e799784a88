package orchard;

import java.util.ArrayList;
import java.util.EnumMap;
import java.util.List;
import java.util.Map;

/** Events and the state that they add up to. */
public final class Stock {
  private interface Event {
    void apply(Map<Fruit, Integer> state);
  }

  private final List<Event> events = new ArrayList<>();

  public Stock in(Fruit fruit, int amount) {
    events.add(state -> state.merge(fruit, amount, Integer::sum));
    return this;
  }

  public Stock out(Fruit fruit, int amount) {
    events.add(
        state ->
            state.compute(
                fruit,
                (key, present) -> {
                  int left = (present == null ? 0 : present) - amount;
                  if (left < 0) {
                    throw new IllegalStateException(fruit + ": " + -left + " missing");
                  }
                  return left == 0 ? null : left;
                }));
    return this;
  }

  public Map<Fruit, Integer> state() {
    Map<Fruit, Integer> state = new EnumMap<>(Fruit.class);
    events.forEach(event -> event.apply(state));
    return state;
  }
}
