package orchard;

/** A day's weather. */
public final class Weather {
  private final double lowCelsius;
  private final double highCelsius;
  private final double rainMillimetres;

  private Weather(Builder builder) {
    lowCelsius = builder.low;
    highCelsius = builder.high;
    rainMillimetres = builder.rain;
  }

  public boolean frost() {
    return lowCelsius < 0;
  }

  public double growth() {
    double mean = (lowCelsius + highCelsius) / 2;
    return Math.max(0, mean - 7) * (1 + Math.log1p(rainMillimetres));
  }

  public static Builder builder() {
    return new Builder();
  }

  /** Collects the parts of a {@link Weather}. */
  public static final class Builder {
    private double low = Double.NaN;
    private double high = Double.NaN;
    private double rain;

    public Builder between(double low, double high) {
      this.low = Math.min(low, high);
      this.high = Math.max(low, high);
      return this;
    }

    public Builder rain(double millimetres) {
      rain = millimetres;
      return this;
    }

    public Weather build() {
      if (Double.isNaN(low) || Double.isNaN(high)) {
        throw new IllegalStateException("no temperatures given");
      }
      return new Weather(this);
    }
  }
}
