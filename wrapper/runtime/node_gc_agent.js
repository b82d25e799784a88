// Preloaded into a Node.js worker: collects its garbage when it is told to, and says so.
//
// Told by SIGUSR2; says so through a named pipe, never through stdout, where worker protocol runs.
// It must not disturb the tool: it keeps no event loop alive and lets no error escape.
'use strict';

(() => {
  const path = process.env.NLWW_NODE_GC_FIFO;
  if (!path) return;
  try {
    if (!require('worker_threads').isMainThread) return;
    const fs = require('fs');
    const v8 = require('v8');
    const vm = require('vm');
    let collect = globalThis.gc;
    if (typeof collect !== 'function') {
      v8.setFlagsFromString('--expose-gc');
      collect = vm.runInNewContext('gc');
      v8.setFlagsFromString('--no-expose-gc');
    }
    const say = (text) => {
      // Opened for each message: a reader that is gone gives an error instead of a hang, and no
      // descriptor of ours shows up in the tool. A message is shorter than PIPE_BUF, so it is whole.
      let fd = -1;
      try {
        fd = fs.openSync(path, fs.constants.O_WRONLY | fs.constants.O_NONBLOCK);
        fs.writeSync(fd, text);
      } catch {
        // Nobody listens any more.
      } finally {
        if (fd >= 0) fs.closeSync(fd);
      }
    };
    // Node does not count a signal listener as a reason to stay alive.
    process.on('SIGUSR2', () => {
      try {
        const before = process.memoryUsage.rss();
        collect();
        say(`gc ${process.pid} ${before} ${process.memoryUsage.rss()}\n`);
      } catch {
        // Then there is no answer, and the wrapper reports that.
      }
    });
    say(`ready ${process.pid}\n`);
  } catch {
    // A tool without garbage collection on demand is better than a tool that does not start.
  }
})();
