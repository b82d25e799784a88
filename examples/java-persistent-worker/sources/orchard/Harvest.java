package orchard;

/** Estimates what the trees give in a year. */
public final class Harvest {
  private static final double[] YIELD_BY_AGE = {0, 0, 0.1, 0.3, 0.6, 0.9, 1.0};

  private Harvest() {}

  public static double expectedGrams(Orchard orchard, int year) {
    return orchard.stream().mapToDouble(tree -> expectedGrams(tree, year)).sum();
  }

  static double expectedGrams(Tree tree, int year) {
    int age = Math.min(tree.ageIn(year), YIELD_BY_AGE.length - 1);
    return YIELD_BY_AGE[age] * perfectCrop(tree.fruit()) * tree.fruit().grams();
  }

  private static int perfectCrop(Fruit fruit) {
    switch (fruit) {
      case CHERRY:
        return 4000;
      case PLUM:
        return 900;
      case APPLE:
      case PEAR:
        return 400;
      default:
        throw new AssertionError(fruit);
    }
  }
}
