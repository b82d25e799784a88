package javaworker;

import java.io.BufferedInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;

/**
 * The persistent worker's loop: reads requests, has them compiled, answers each one exactly once.
 *
 * <p>Owns threads, cancelling and the order of answers. Singleplex requests (id 0) run one after the
 * other; those with an id of their own run side by side, as many as there are processors.
 *
 * <p>SIGTERM needs no code here: the JVM ends at once, and javac leaves nothing to clean up.
 */
final class Worker {
  private final InputStream requests;
  private final OutputStream responses;
  private final List<String> startupArguments;
  private final Compile compile;
  private final ExecutorService singleplex = Executors.newSingleThreadExecutor();
  private final ExecutorService multiplex =
      Executors.newFixedThreadPool(Runtime.getRuntime().availableProcessors());

  /** Requests that are not answered yet, each with its "was cancelled" flag. */
  private final Map<Integer, AtomicBoolean> inFlight = new ConcurrentHashMap<>();

  Worker(InputStream requests, OutputStream responses, List<String> startupArguments, Compile compile) {
    this.requests = new BufferedInputStream(requests, 1 << 16);
    this.responses = responses;
    this.startupArguments = startupArguments;
    this.compile = compile;
  }

  /**
   * Serves until the stream of requests ends; requests that were accepted are still answered.
   *
   * @return the exit code of the process
   */
  int serve() throws InterruptedException {
    int exitCode = 0;
    try {
      WorkProtocol.Request request;
      while ((request = WorkProtocol.readRequest(requests)) != null) {
        accept(request);
      }
    } catch (IOException notTheProtocol) {
      System.err.println("java worker: standard input is not the worker protocol: " + notTheProtocol.getMessage());
      exitCode = 1;
    }
    singleplex.shutdown();
    multiplex.shutdown();
    singleplex.awaitTermination(Long.MAX_VALUE, TimeUnit.NANOSECONDS);
    multiplex.awaitTermination(Long.MAX_VALUE, TimeUnit.NANOSECONDS);
    return exitCode;
  }

  private void accept(WorkProtocol.Request request) {
    int id = request.requestId;
    if (request.cancel) {
      // A cancel of a request that was answered already, or never came, is ignored: the protocol allows that race.
      AtomicBoolean cancelled = inFlight.get(id);
      if (cancelled != null) {
        cancelled.set(true);
      }
      return;
    }
    AtomicBoolean cancelled = new AtomicBoolean();
    inFlight.put(id, cancelled);
    (id == 0 ? singleplex : multiplex).execute(() -> answer(request, cancelled));
  }

  private void answer(WorkProtocol.Request request, AtomicBoolean cancelled) {
    int id = request.requestId;
    byte[] frame;
    try {
      WorkProtocol.Response response = cancelled.get() ? null : perform(request);
      // javac cannot be stopped half-way. By now it has ended, so it writes no more files, which is what
      // "was cancelled" promises.
      frame = (cancelled.get() ? WorkProtocol.Response.cancelled(id) : response).toFrame();
    } catch (Throwable broken) {
      frame = WorkProtocol.Response.of(id, Compile.BROKEN, Compile.describe(broken)).toFrame();
    }
    inFlight.remove(id, cancelled);
    send(frame);
  }

  private WorkProtocol.Response perform(WorkProtocol.Request request) {
    if (request.sandboxDir.length > 0) {
      return WorkProtocol.Response.of(
          request.requestId, 1, "java worker: sandbox_dir is set, and this worker does not support it\n");
    }
    List<String> arguments = new ArrayList<>(startupArguments);
    arguments.addAll(request.argumentsAsText());
    Compile.Result result = compile.run(arguments);
    return WorkProtocol.Response.of(request.requestId, result.exitCode, result.output);
  }

  private void send(byte[] frame) {
    try {
      synchronized (responses) {
        responses.write(frame);
        responses.flush();
      }
    } catch (IOException nobodyListens) {
      // Whoever started us is gone; there is nobody left to work for.
      System.err.println("java worker: cannot write the response: " + nobodyListens.getMessage());
      Runtime.getRuntime().halt(1);
    }
  }
}
