package javaworker;

import java.io.ByteArrayOutputStream;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.charset.Charset;
import java.util.List;
import javax.tools.JavaCompiler;
import javax.tools.ToolProvider;

/**
 * One compilation by the javac of the running JDK, in this process.
 *
 * <p>Owns what javac is told and what becomes of its messages. Knows nothing of the protocol. Safe to
 * call from several threads: calls share nothing but the compiler's code.
 */
final class Compile {
  /** javac's own exit code for "something is broken", as against 1: errors in the sources. */
  static final int BROKEN = 4;

  private final JavaCompiler javac;

  Compile() {
    javac = ToolProvider.getSystemJavaCompiler();
    if (javac == null) {
      throw new IllegalStateException(
          "this Java runtime has no compiler: run the worker on a JDK, not on a JRE (java.home="
              + System.getProperty("java.home") + ")");
    }
  }

  /** How a compilation ended: javac's exit code, and all that it said. */
  static final class Result {
    final int exitCode;
    final String output;

    Result(int exitCode, String output) {
      this.exitCode = exitCode;
      this.output = output;
    }
  }

  /**
   * Compiles as the command {@code javac ARGUMENTS} would, {@code @argfiles} included.
   *
   * <p>{@link JavaCompiler#run} makes a new file manager for each call and closes it afterwards. That
   * is wanted: a worker's paths stay the same from request to request, and with equal modification
   * times (build systems set them all to one value) a file manager that is kept answers from the
   * directory listings and the open jars of an earlier request, so a changed class path would compile
   * against stale classes. Keeping one was measured to gain nothing.
   *
   * <p>Never throws for what a compilation does, running out of memory or stack included: that is this
   * request's failure, and the next request may well fit.
   */
  Result run(List<String> arguments) {
    ByteArrayOutputStream messages = new ByteArrayOutputStream();
    int exitCode;
    String trouble = "";
    try {
      exitCode = javac.run(null, messages, messages, arguments.toArray(new String[0]));
    } catch (Throwable broken) {
      exitCode = BROKEN;
      trouble = describe(broken);
    }
    // javac wrote in the platform's character set; the protocol's text is UTF-8.
    return new Result(exitCode, new String(messages.toByteArray(), Charset.defaultCharset()) + trouble);
  }

  static String describe(Throwable broken) {
    StringWriter text = new StringWriter();
    broken.printStackTrace(new PrintWriter(text, true));
    return text.toString();
  }
}
