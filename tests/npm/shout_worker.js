// A small worker on npm's @bazel/worker: writes the file named first, in capitals, to the file named second.
// It logs a line for each request, which the library puts into the response's output.
'use strict';

const fs = require('fs');
const worker = require('@bazel/worker');

function shout(args) {
  const [from, to] = args;
  fs.writeFileSync(to, fs.readFileSync(from, 'utf8').toUpperCase());
  worker.log(`shouted ${from}`);
  return true;
}

if (worker.runAsWorker(process.argv.slice(2))) {
  worker.runWorkerLoop(shout);
} else {
  process.exitCode = shout(process.argv.slice(2)) ? 0 : 1;
}
