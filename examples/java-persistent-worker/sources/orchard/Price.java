package orchard;

import java.math.BigDecimal;
import java.math.RoundingMode;

/** An amount of money in cents. */
public final class Price implements Comparable<Price> {
  public static final Price ZERO = new Price(0);

  private final long cents;

  private Price(long cents) {
    this.cents = cents;
  }

  public static Price of(String text) {
    return new Price(new BigDecimal(text).movePointRight(2).longValueExact());
  }

  public Price plus(Price other) {
    return new Price(Math.addExact(cents, other.cents));
  }

  public Price times(double factor) {
    return new Price(BigDecimal.valueOf(cents).multiply(BigDecimal.valueOf(factor))
        .setScale(0, RoundingMode.HALF_EVEN).longValue());
  }

  @Override
  public int compareTo(Price other) {
    return Long.compare(cents, other.cents);
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof Price && cents == ((Price) other).cents;
  }

  @Override
  public int hashCode() {
    return Long.hashCode(cents);
  }

  @Override
  public String toString() {
    return cents / 100 + "." + (cents % 100 < 10 ? "0" : "") + cents % 100;
  }
}
