package orchard;

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Collection;
import java.util.List;

/** Trees to bytes and back. */
public final class Codec {
  private static final int MAGIC = 0x0FC4A2D1;

  private Codec() {}

  public static byte[] encode(Collection<Tree> trees, int year) throws IOException {
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    try (DataOutputStream out = new DataOutputStream(bytes)) {
      out.writeInt(MAGIC);
      out.writeInt(trees.size());
      for (Tree tree : trees) {
        out.writeShort(tree.row());
        out.writeShort(tree.column());
        out.writeByte(tree.fruit().ordinal());
        out.writeShort(year - tree.ageIn(year));
      }
    }
    return bytes.toByteArray();
  }

  public static List<Tree> decode(byte[] data) throws IOException {
    try (DataInputStream in = new DataInputStream(new ByteArrayInputStream(data))) {
      if (in.readInt() != MAGIC) {
        throw new IOException("not an orchard");
      }
      List<Tree> trees = new ArrayList<>();
      for (int left = in.readInt(); left > 0; left--) {
        trees.add(new Tree(in.readShort(), in.readShort(), Fruit.values()[in.readByte()], in.readShort()));
      }
      return trees;
    }
  }
}
