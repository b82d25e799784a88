package orchard;

import java.util.Arrays;
import java.util.function.Function;

/** A rectangle of values, indexed by row and column. */
public class Grid<V> {
  private final Object[][] cells;

  public Grid(int rows, int columns) {
    cells = new Object[rows][columns];
  }

  @SuppressWarnings("unchecked")
  public V get(int row, int column) {
    return (V) cells[row][column];
  }

  public void set(int row, int column, V value) {
    cells[row][column] = value;
  }

  public <W> Grid<W> map(Function<? super V, ? extends W> function) {
    Grid<W> mapped = new Grid<>(cells.length, cells.length == 0 ? 0 : cells[0].length);
    for (int row = 0; row < cells.length; row++) {
      for (int column = 0; column < cells[row].length; column++) {
        V value = get(row, column);
        mapped.set(row, column, value == null ? null : function.apply(value));
      }
    }
    return mapped;
  }

  @Override
  public String toString() {
    return Arrays.deepToString(cells);
  }
}
