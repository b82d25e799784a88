package javaworker;

import java.io.ByteArrayOutputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * Bytes to {@link Request} and {@link Response} to bytes: Bazel's worker protocol, length-delimited
 * protobuf form, written by hand so that the worker needs nothing but a JDK.
 *
 * <p>Owns the wire format only. Knows nothing of compilers or threads.
 */
final class WorkProtocol {
  /** A length above this is text that somebody printed, not a frame. */
  static final int MAX_FRAME_BYTES = 64 << 20;

  private static final int VARINT = 0;
  private static final int FIXED64 = 1;
  private static final int BYTES = 2;
  private static final int FIXED32 = 5;

  private WorkProtocol() {}

  /** One WorkRequest. The inputs are left out: this worker opens files by name, always anew. */
  static final class Request {
    /** Raw bytes, since nothing promises that an argument is UTF-8. */
    final List<byte[]> arguments = new ArrayList<>();
    int requestId;
    boolean cancel;
    int verbosity;
    byte[] sandboxDir = {};

    List<String> argumentsAsText() {
      List<String> text = new ArrayList<>(arguments.size());
      for (byte[] argument : arguments) {
        text.add(new String(argument, StandardCharsets.UTF_8));
      }
      return text;
    }
  }

  /** One WorkResponse. */
  static final class Response {
    final int exitCode;
    final String output;
    final int requestId;
    final boolean wasCancelled;

    private Response(int exitCode, String output, int requestId, boolean wasCancelled) {
      this.exitCode = exitCode;
      this.output = output;
      this.requestId = requestId;
      this.wasCancelled = wasCancelled;
    }

    static Response of(int requestId, int exitCode, String output) {
      return new Response(exitCode, output, requestId, false);
    }

    static Response cancelled(int requestId) {
      return new Response(0, "", requestId, true);
    }

    /** The whole frame, length first, for one write call: a reader may not survive a split frame. */
    byte[] toFrame() {
      ByteArrayOutputStream body = new ByteArrayOutputStream(output.length() + 16);
      if (exitCode != 0) {
        writeTag(body, 1, VARINT);
        writeVarint(body, exitCode);
      }
      if (!output.isEmpty()) {
        byte[] text = output.getBytes(StandardCharsets.UTF_8);
        writeTag(body, 2, BYTES);
        writeVarint(body, text.length);
        body.write(text, 0, text.length);
      }
      if (requestId != 0) {
        writeTag(body, 3, VARINT);
        writeVarint(body, requestId);
      }
      if (wasCancelled) {
        writeTag(body, 4, VARINT);
        writeVarint(body, 1);
      }
      ByteArrayOutputStream frame = new ByteArrayOutputStream(body.size() + 5);
      writeVarint(frame, body.size());
      frame.write(body.toByteArray(), 0, body.size());
      return frame.toByteArray();
    }
  }

  /**
   * Reads one frame; null at a clean end of the stream.
   *
   * @throws IOException if the stream ends inside a frame or holds something else than a frame
   */
  static Request readRequest(InputStream in) throws IOException {
    int first = in.read();
    if (first < 0) {
      return null;
    }
    long length = readLength(in, first);
    if (length > MAX_FRAME_BYTES) {
      throw new IOException("a frame of " + length + " bytes; at most " + MAX_FRAME_BYTES + " are allowed");
    }
    byte[] body = in.readNBytes((int) length);
    if (body.length < length) {
      throw new EOFException("the stream ended inside a frame: " + body.length + " of " + length + " bytes");
    }
    return parseRequest(body);
  }

  private static long readLength(InputStream in, int first) throws IOException {
    long value = first & 0x7f;
    int next = first;
    for (int shift = 7; (next & 0x80) != 0; shift += 7) {
      if (shift > 28) {
        throw new IOException("a frame's length of more than 5 bytes");
      }
      next = in.read();
      if (next < 0) {
        throw new EOFException("the stream ended inside a frame's length");
      }
      value |= (long) (next & 0x7f) << shift;
    }
    return value;
  }

  /** Fields with numbers that this worker does not know are skipped: newer senders have more. */
  static Request parseRequest(byte[] body) throws IOException {
    Request request = new Request();
    Fields fields = new Fields(body);
    while (fields.next()) {
      switch (fields.tag) {
        case 1 << 3 | BYTES:
          request.arguments.add(fields.bytes());
          break;
        case 3 << 3 | VARINT:
          request.requestId = (int) fields.varint();
          break;
        case 4 << 3 | VARINT:
          request.cancel = fields.varint() != 0;
          break;
        case 5 << 3 | VARINT:
          request.verbosity = (int) fields.varint();
          break;
        case 6 << 3 | BYTES:
          request.sandboxDir = fields.bytes();
          break;
        default:
          fields.skip();
      }
    }
    return request;
  }

  private static void writeTag(ByteArrayOutputStream out, int field, int wireType) {
    writeVarint(out, field << 3 | wireType);
  }

  /** Negative numbers take ten bytes, as protobuf's int32 wants it. */
  private static void writeVarint(ByteArrayOutputStream out, long value) {
    while ((value & ~0x7fL) != 0) {
      out.write((int) (value & 0x7f | 0x80));
      value >>>= 7;
    }
    out.write((int) value);
  }

  /** Walks over the fields of one encoded message. */
  private static final class Fields {
    private final byte[] data;
    private int position;
    int tag;

    Fields(byte[] data) {
      this.data = data;
    }

    boolean next() throws IOException {
      if (position == data.length) {
        return false;
      }
      tag = (int) varint();
      if (tag >>> 3 == 0) {
        throw new IOException("field number 0 at byte " + position);
      }
      return true;
    }

    long varint() throws IOException {
      long value = 0;
      for (int shift = 0; shift < 64; shift += 7) {
        if (position == data.length) {
          throw new IOException("a number that runs over the end of its message");
        }
        byte next = data[position++];
        value |= (long) (next & 0x7f) << shift;
        if (next >= 0) {
          return value;
        }
      }
      throw new IOException("a number of more than 10 bytes at byte " + position);
    }

    byte[] bytes() throws IOException {
      long length = varint();
      int start = position;
      advance(length);
      return Arrays.copyOfRange(data, start, position);
    }

    void skip() throws IOException {
      switch (tag & 7) {
        case VARINT:
          varint();
          break;
        case FIXED64:
          advance(8);
          break;
        case BYTES:
          advance(varint());
          break;
        case FIXED32:
          advance(4);
          break;
        default:
          throw new IOException("wire type " + (tag & 7) + " at byte " + position);
      }
    }

    private void advance(long count) throws IOException {
      if (count < 0 || count > data.length - position) {
        throw new IOException("a field of " + count + " bytes where " + (data.length - position) + " are left");
      }
      position += (int) count;
    }
  }
}
