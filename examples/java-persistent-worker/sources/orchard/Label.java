package orchard;

import java.util.ArrayList;
import java.util.List;

/** Text that fits on a label: wrapped at words. */
public final class Label {
  private final int width;

  public Label(int width) {
    if (width < 1) {
      throw new IllegalArgumentException("width " + width);
    }
    this.width = width;
  }

  public List<String> wrap(String text) {
    List<String> lines = new ArrayList<>();
    StringBuilder line = new StringBuilder();
    for (String word : text.trim().split("\\s+")) {
      if (line.length() > 0 && line.length() + 1 + word.length() > width) {
        lines.add(line.toString());
        line.setLength(0);
      }
      if (line.length() > 0) {
        line.append(' ');
      }
      line.append(word);
    }
    if (line.length() > 0) {
      lines.add(line.toString());
    }
    return lines;
  }
}
