package orchard;

import java.lang.annotation.ElementType;
import java.lang.annotation.Retention;
import java.lang.annotation.RetentionPolicy;
import java.lang.annotation.Target;
import java.util.EnumMap;
import java.util.Map;

/** What a dish needs. */
@Recipe.Keeps(months = 3)
public class Recipe {
  /** How long the dish keeps. */
  @Retention(RetentionPolicy.RUNTIME)
  @Target(ElementType.TYPE)
  public @interface Keeps {
    int months() default 1;

    String[] where() default {"cellar"};
  }

  private final Map<Fruit, Integer> grams = new EnumMap<>(Fruit.class);

  public Recipe with(Fruit fruit, int amount) {
    grams.merge(fruit, amount, Integer::sum);
    return this;
  }

  public int monthsItKeeps() {
    Keeps keeps = getClass().getAnnotation(Keeps.class);
    return keeps == null ? 0 : keeps.months();
  }

  public int piecesOf(Fruit fruit) {
    return (grams.getOrDefault(fruit, 0) + fruit.grams() - 1) / fruit.grams();
  }
}
