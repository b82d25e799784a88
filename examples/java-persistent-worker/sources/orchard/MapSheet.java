package orchard;

import java.util.Arrays;

/** Draws an orchard as text, a letter a tree. */
public final class MapSheet {
  private MapSheet() {}

  public static String draw(Orchard orchard) {
    int rows = 0;
    int columns = 0;
    for (Tree tree : orchard) {
      rows = Math.max(rows, tree.row() + 1);
      columns = Math.max(columns, tree.column() + 1);
    }
    char[][] sheet = new char[rows][columns];
    for (char[] line : sheet) {
      Arrays.fill(line, '.');
    }
    for (Tree tree : orchard) {
      sheet[tree.row()][tree.column()] = tree.fruit().name().charAt(0);
    }
    StringBuilder text = new StringBuilder();
    for (char[] line : sheet) {
      text.append(line).append('\n');
    }
    return text.toString();
  }
}
