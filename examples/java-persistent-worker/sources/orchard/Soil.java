package orchard;

import java.util.Arrays;

/** A sample of soil, with acidity and what it lacks. */
public interface Soil {
  double acidity();

  default boolean suits(Fruit fruit) {
    switch (fruit) {
      case CHERRY:
        return acidity() >= 6.5;
      case PLUM:
        return acidity() >= 6.0;
      default:
        return acidity() >= 5.5 && acidity() <= 7.5;
    }
  }

  static Soil of(double acidity) {
    return () -> acidity;
  }

  static Soil mixed(Soil... parts) {
    double mean = Arrays.stream(parts).mapToDouble(Soil::acidity).average().orElse(7);
    return new Soil() {
      @Override
      public double acidity() {
        return mean;
      }

      @Override
      public String toString() {
        return parts.length + " soils of mean acidity " + mean;
      }
    };
  }
}
