package orchard;

import java.util.Locale;

/** Reads what {@link MapSheet} draws. */
public final class MapReader {
  /** The text is no map; says where. */
  public static class MapException extends Exception {
    private static final long serialVersionUID = 1L;

    MapException(int line, int column, char letter) {
      super(String.format(Locale.ROOT, "line %d, column %d: unknown letter '%c'", line, column, letter));
    }
  }

  private MapReader() {}

  public static Orchard read(String text, int year) throws MapException {
    Orchard orchard = new Orchard();
    String[] lines = text.split("\n");
    for (int row = 0; row < lines.length; row++) {
      for (int column = 0; column < lines[row].length(); column++) {
        char letter = lines[row].charAt(column);
        if (letter == '.') {
          continue;
        }
        orchard.plant(new Tree(row, column, fruit(letter, row, column), year));
      }
    }
    return orchard;
  }

  private static Fruit fruit(char letter, int row, int column) throws MapException {
    for (Fruit fruit : Fruit.values()) {
      if (fruit.name().charAt(0) == letter) {
        return fruit;
      }
    }
    throw new MapException(row + 1, column + 1, letter);
  }
}
