package orchard;

import java.util.Objects;

/** A fruit tree of the orchard: the small model that the other sources work on. */
public final class Tree implements Comparable<Tree> {
  private final int row;
  private final int column;
  private final Fruit fruit;
  private final int plantedYear;

  public Tree(int row, int column, Fruit fruit, int plantedYear) {
    if (row < 0 || column < 0) {
      throw new IllegalArgumentException("no such place: " + row + ", " + column);
    }
    this.row = row;
    this.column = column;
    this.fruit = Objects.requireNonNull(fruit, "fruit");
    this.plantedYear = plantedYear;
  }

  public int row() {
    return row;
  }

  public int column() {
    return column;
  }

  public Fruit fruit() {
    return fruit;
  }

  public int ageIn(int year) {
    return Math.max(0, year - plantedYear);
  }

  @Override
  public int compareTo(Tree other) {
    int byRow = Integer.compare(row, other.row);
    return byRow != 0 ? byRow : Integer.compare(column, other.column);
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof Tree && compareTo((Tree) other) == 0 && fruit == ((Tree) other).fruit;
  }

  @Override
  public int hashCode() {
    return Objects.hash(row, column, fruit);
  }

  @Override
  public String toString() {
    return fruit + "@" + row + "/" + column;
  }
}
