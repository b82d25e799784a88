import java.io.BufferedInputStream;
import java.io.ByteArrayOutputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/**
 * {@code JvmWarmup ITERATIONS SOURCES WORKER...}: has a worker of its own compile, and collect its garbage.
 *
 * <p>Owns that worker and a temporary folder for what it compiles. Speaks just enough of the worker protocol.
 */
final class JvmWarmup {
  private static final int LAST = 20;

  private JvmWarmup() {}

  public static void main(String[] words) throws Exception {
    int iterations = Integer.parseInt(words[0]);
    Path sources = Path.of(words[1]);
    List<String> files;
    try (Stream<Path> found = Files.walk(sources)) {
      files = found.map(Path::toString).filter(name -> name.endsWith(".java")).sorted().collect(Collectors.toList());
    }
    Path output = Files.createTempDirectory("jvm-warmup");
    Process worker =
        new ProcessBuilder(Arrays.asList(words).subList(2, words.length))
            .redirectError(ProcessBuilder.Redirect.INHERIT)
            .start();
    try {
      long[] nanos = new long[iterations];
      InputStream answers = new BufferedInputStream(worker.getInputStream());
      for (int i = 0; i < iterations; i++) {
        long begin = System.nanoTime();
        send(worker.getOutputStream(), List.of(
            "-proc:none", "-implicit:none", "-nowarn", "-encoding", "UTF-8", "-sourcepath", sources.toString(),
            "-d", output.toString(), files.get(i % files.size())));
        String failure = receive(answers);
        if (failure != null) {
          fail(files.get(i % files.size()) + " was not compiled: " + failure);
        }
        nanos[i] = System.nanoTime() - begin;
      }
      long begin = System.nanoTime();
      collectGarbage(worker.pid());
      long collection = System.nanoTime() - begin;
      worker.getOutputStream().close();
      if (!worker.waitFor(30, TimeUnit.SECONDS) || worker.exitValue() != 0) {
        fail("the worker did not end well when its input ended");
      }
      System.out.printf(
          "jvm-warmup: %d compilations, the first in %.1f ms, the last %d in %.1f ms each; garbage collected in %.0f ms%n",
          iterations, nanos[0] / 1e6, LAST, median(Arrays.copyOfRange(nanos, iterations - LAST, iterations)) / 1e6,
          collection / 1e6);
    } finally {
      worker.destroyForcibly();
      try (Stream<Path> made = Files.walk(output)) {
        for (Path path : made.sorted(Comparator.reverseOrder()).collect(Collectors.toList())) {
          Files.delete(path);
        }
      }
    }
  }

  /** From outside, the way that the worker's pool does it. */
  private static void collectGarbage(long pid) throws IOException, InterruptedException {
    String jcmd = Path.of(System.getProperty("java.home"), "bin", "jcmd").toString();
    ProcessBuilder command =
        new ProcessBuilder(jcmd, "-J-XX:TieredStopAtLevel=1", "-J-Xmx32m", Long.toString(pid), "GC.run");
    Process process = command.redirectErrorStream(true).start();
    String said = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
    if (process.waitFor() != 0) {
      fail("the worker cannot be told to collect its garbage: " + said);
    }
  }

  private static double median(long[] values) {
    Arrays.sort(values);
    return values[values.length / 2];
  }

  private static void fail(String why) {
    throw new IllegalStateException(why);
  }

  // The worker protocol: messages with their length before them, fields of a WorkRequest and a WorkResponse.

  private static void send(OutputStream requests, List<String> arguments) throws IOException {
    ByteArrayOutputStream message = new ByteArrayOutputStream();
    for (String argument : arguments) {
      byte[] text = argument.getBytes(StandardCharsets.UTF_8);
      message.write(1 << 3 | 2);
      writeVarint(message, text.length);
      message.write(text);
    }
    ByteArrayOutputStream frame = new ByteArrayOutputStream();
    writeVarint(frame, message.size());
    message.writeTo(frame);
    requests.write(frame.toByteArray());
    requests.flush();
  }

  /** Null if the answer says that all went well, else what it says. */
  private static String receive(InputStream answers) throws IOException {
    int[] left = {readVarint(answers, new int[] {10})};
    long exitCode = 0;
    String output = "";
    while (left[0] > 0) {
      int tag = readVarint(answers, left);
      if ((tag & 7) == 2) {
        int size = readVarint(answers, left);
        byte[] text = answers.readNBytes(size);
        left[0] -= size;
        output = tag >> 3 == 2 ? new String(text, StandardCharsets.UTF_8) : output;
      } else {
        int value = readVarint(answers, left);
        exitCode = tag >> 3 == 1 ? value : exitCode;
      }
    }
    return exitCode == 0 ? null : "exit code " + exitCode + "\n" + output;
  }

  private static void writeVarint(ByteArrayOutputStream bytes, int value) {
    for (; value > 0x7f; value >>>= 7) {
      bytes.write(value & 0x7f | 0x80);
    }
    bytes.write(value);
  }

  private static int readVarint(InputStream bytes, int[] left) throws IOException {
    long value = 0;
    for (int shift = 0; ; shift += 7) {
      int next = bytes.read();
      if (next < 0) {
        throw new EOFException("the worker has ended");
      }
      left[0]--;
      value |= shift < 64 ? (next & 0x7fL) << shift : 0;
      if (next < 0x80) {
        return (int) value;
      }
    }
  }
}
