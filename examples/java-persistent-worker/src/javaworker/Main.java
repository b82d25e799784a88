package javaworker;

import java.io.FileDescriptor;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.InputStream;
import java.io.OutputStream;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * {@code java -jar java-worker.jar [ARGUMENTS] --persistent_worker}: a persistent worker, whose requests
 * hold javac's arguments (ARGUMENTS stand before those of every request). Without
 * {@code --persistent_worker}: one compilation, as javac does it.
 */
public final class Main {
  private static final String PERSISTENT = "--persistent_worker";

  private Main() {}

  public static void main(String[] args) {
    List<String> arguments = new ArrayList<>(Arrays.asList(args));
    if (!arguments.removeIf(PERSISTENT::equals)) {
      Compile.Result result = new Compile().run(arguments);
      System.err.print(result.output);
      System.err.flush();
      System.exit(result.exitCode);
    }
    // From here on only Worker can reach the protocol's streams: one stray line of an annotation
    // processor on stdout would end the build.
    InputStream requests = new FileInputStream(FileDescriptor.in);
    OutputStream responses = new FileOutputStream(FileDescriptor.out);
    System.setOut(System.err);
    System.setIn(InputStream.nullInputStream());
    int exitCode = 1;
    try {
      exitCode = new Worker(requests, responses, arguments, new Compile()).serve();
    } catch (Throwable broken) {
      System.err.print(Compile.describe(broken));
    }
    // exit, not return: other threads (ours, an annotation processor's) must not keep the process alive.
    System.exit(exitCode);
  }
}
