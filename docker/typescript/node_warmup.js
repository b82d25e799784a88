// node_warmup.js ITERATIONS SOURCES WORKER...: has a worker of its own compile, and collect its garbage.
//
// Owns that worker and a temporary folder for what it compiles and says. Speaks the worker protocol in JSON.
'use strict';

const crypto = require('crypto');
const { execFileSync, spawn } = require('child_process');
const fs = require('fs');
const os = require('os');
const path = require('path');
const readline = require('readline');

const LAST = 20;
const GC_TIMEOUT_MS = 30_000;
const AGENT = path.join(__dirname, 'node_gc_agent.js');

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

/** The next line with `word` at its beginning, of what a stream says from now on. */
function lineWith(lines, word) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`the worker does not say "${word}"`)), GC_TIMEOUT_MS);
    lines.on('line', (line) => {
      if (!line.startsWith(`${word} `)) return;
      clearTimeout(timer);
      resolve(line);
    });
  });
}

async function warmUp(iterations, sources, argv, folder) {
  const files = fs.readdirSync(sources).filter((name) => name.endsWith('.ts')).sort();
  const inputs = files.map((name) => {
    const content = fs.readFileSync(path.join(sources, name));
    return { path: name, digest: crypto.createHash('sha256').update(content).digest('base64') };
  });
  const fifo = path.join(folder, 'gc');
  execFileSync('mkfifo', [fifo]);
  // Read and write: opening it waits for nobody.
  const said = readline.createInterface({ input: fs.createReadStream(fifo, { flags: 'r+' }) });
  const isLoaded = (process.env.NODE_OPTIONS ?? '').includes('node_gc_agent.js');
  const worker = spawn(process.execPath, [...(isLoaded ? [] : ['--require', AGENT]), ...argv], {
    cwd: sources,
    env: { ...process.env, NLWW_NODE_GC_FIFO: fifo },
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  try {
    const ended = new Promise((resolve) => worker.on('close', resolve));
    worker.stdin.on('error', () => {}); // it has ended, which the answer tells that does not come
    const answers = readline.createInterface({ input: worker.stdout })[Symbol.asyncIterator]();
    const times = [];
    for (let i = 0; i < iterations; i++) {
      const begin = performance.now();
      const words = [files[i % files.length], '--target', 'es2022', '--module', 'commonjs', '--strict', '--skipLibCheck', '--outDir', folder];
      worker.stdin.write(`${JSON.stringify({ arguments: words, inputs })}\n`);
      const { value: line } = await answers.next();
      if (line === undefined) throw new Error(`the worker has ended with ${await ended}`);
      const response = JSON.parse(line);
      if (response.exitCode) throw new Error(`${words[0]} was not compiled: ${response.output}`);
      times.push(performance.now() - begin);
    }
    const collected = lineWith(said, 'gc');
    const begin = performance.now();
    worker.kill('SIGUSR2');
    await collected;
    const collection = performance.now() - begin;
    worker.stdin.end();
    const code = await ended;
    if (code !== 0) throw new Error(`the worker ended with ${code} when its input ended`);
    console.log(
      `node-warmup: ${iterations} compilations, the first in ${times[0].toFixed(1)} ms, the last ${LAST} in ` +
        `${median(times.slice(-LAST)).toFixed(1)} ms each; garbage collected in ${collection.toFixed(0)} ms`,
    );
  } finally {
    worker.kill('SIGKILL');
  }
}

const [iterations, sources, ...argv] = process.argv.slice(2);
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'node-warmup-'));
let exitCode = 0;
warmUp(Number(iterations), sources, argv, folder)
  .catch((error) => {
    console.error(`node-warmup: ${error.message}`);
    exitCode = 1;
  })
  .finally(() => {
    fs.rmSync(folder, { recursive: true, force: true });
    process.exit(exitCode); // the pipe that it listens on would keep it alive
  });
