// A persistent worker that compiles TypeScript: Bazel's worker protocol in JSON, one request after the other.
//
//   node typescript_worker.js [ARGUMENTS] --persistent_worker     requests hold tsc's arguments, after ARGUMENTS
//   node typescript_worker.js ARGUMENTS                           one compilation, as tsc does it
//
// Every request is a program of its own, and all that it asks the file system is asked anew. What is kept from
// request to request are parsed files, by content: a path may hold another file the next time.
'use strict';

const fs = require('fs');
const path = require('path');
const ts = require('typescript');

const PERSISTENT = '--persistent_worker';
const BROKEN = 3;
const MAX_CACHED_CHARACTERS = 64 * 1024 * 1024;
const MAX_REQUEST_BYTES = 64 * 1024 * 1024;
// Where output goes says nothing of what is parsed or bound.
const OUTPUT_OPTIONS = new Set(['outDir', 'outFile', 'declarationDir', 'rootDir', 'tsBuildInfoFile', 'configFile']);

// ---- parsed files ------------------------------------------------------------------------------------

/** Parsed files by path, content and options; the least recently used ones go first. */
class ParsedFiles {
  constructor() {
    this._files = new Map();
    this._characters = 0;
  }

  get(key, parse) {
    let file = this._files.get(key);
    if (file === undefined) {
      file = parse();
      if (file === undefined) return undefined;
      this._characters += file.text.length;
    } else {
      this._files.delete(key);
    }
    this._files.set(key, file);
    for (const [oldest, old] of this._files) {
      if (this._characters <= MAX_CACHED_CHARACTERS || oldest === key) break;
      this._files.delete(oldest);
      this._characters -= old.text.length;
    }
    return file;
  }
}

const parsedFiles = new ParsedFiles();

// TypeScript's own declarations come with this program and do not change while it runs.
const LIBRARY = path.dirname(fs.realpathSync(require.resolve('typescript')));

function contentOf(file, digests) {
  const digest = digests.get(file);
  if (digest !== undefined) return `digest ${digest}`;
  return path.dirname(file) === LIBRARY ? 'library' : undefined;
}

/** A file is bound once, too, and what that makes of it depends on options: they all are part of the key. */
function optionsKey(options) {
  const names = Object.keys(options).filter((name) => !OUTPUT_OPTIONS.has(name)).sort();
  return JSON.stringify(names.map((name) => [name, options[name]]));
}

function compilerHost(options, digests) {
  const host = ts.createCompilerHost(options);
  const key = optionsKey(options);
  const parse = host.getSourceFile;
  host.getSourceFile = (name, how, onError) => {
    const file = path.resolve(name);
    const content = contentOf(file, digests);
    if (content === undefined) return parse(name, how, onError);
    const { languageVersion, impliedNodeFormat } = typeof how === 'object' ? how : { languageVersion: how };
    const parts = [file, content, key, languageVersion, impliedNodeFormat];
    return parsedFiles.get(parts.join('\0'), () => parse(name, how, onError));
  };
  return host;
}

// ---- a compilation -----------------------------------------------------------------------------------

function parsedCommandLine(words) {
  const given = ts.parseCommandLine(words, ts.sys.readFile);
  if (given.errors.length > 0 || given.options.project === undefined) return given;
  const found = ts.sys.directoryExists(given.options.project)
    ? path.join(given.options.project, 'tsconfig.json')
    : given.options.project;
  const unreadable = [];
  const host = { ...ts.sys, onUnRecoverableConfigFileDiagnostic: (problem) => unreadable.push(problem) };
  const parsed = ts.getParsedCommandLineOfConfigFile(found, given.options, host);
  return parsed ?? { ...given, errors: unreadable };
}

/** `tsc WORDS`: its exit code, and all that it said. `digests`: of input files, by absolute path. */
function compile(words, digests) {
  const line = parsedCommandLine(words);
  let problems = line.errors;
  let skipped = true;
  if (problems.length === 0 && line.fileNames.length === 0) {
    return { exitCode: 1, output: 'error: no source file was named, and no project\n' };
  }
  if (problems.length === 0) {
    const { fileNames: rootNames, options, projectReferences } = line;
    const host = compilerHost(options, digests);
    const program = ts.createProgram({ rootNames, options, projectReferences, host });
    const before = ts.getPreEmitDiagnostics(program);
    const emitted = program.emit();
    problems = ts.sortAndDeduplicateDiagnostics([...before, ...emitted.diagnostics]);
    skipped = emitted.emitSkipped;
  }
  const output = ts.formatDiagnostics(problems, {
    getCurrentDirectory: () => process.cwd(),
    getCanonicalFileName: (name) => name,
    getNewLine: () => '\n',
  });
  const failed = problems.some((problem) => problem.category === ts.DiagnosticCategory.Error);
  return { exitCode: failed ? (skipped ? 1 : 2) : 0, output };
}

// ---- the protocol ------------------------------------------------------------------------------------

/** Cuts a stream into JSON objects, with or without white space between them. */
class Objects {
  constructor(take) {
    this._take = take;
    this._chunks = [];
    this._bytes = 0;
    this._depth = 0;
    this._inString = false;
    this._escaped = false;
  }

  feed(chunk) {
    let begin = 0;
    for (let at = 0; at < chunk.length; at++) {
      const byte = chunk[at];
      if (this._inString) {
        if (this._escaped) this._escaped = false;
        else if (byte === 0x5c) this._escaped = true;
        else if (byte === 0x22) this._inString = false;
      } else if (byte === 0x22) this._inString = true;
      else if (byte === 0x7b) this._depth++;
      else if (byte === 0x7d && --this._depth === 0) {
        const text = Buffer.concat([...this._chunks, chunk.subarray(begin, at + 1)]).toString();
        begin = at + 1;
        this._chunks = [];
        this._bytes = 0;
        this._take(JSON.parse(text));
      }
    }
    if (begin < chunk.length) this._chunks.push(chunk.subarray(begin));
    this._bytes += chunk.length - begin;
    if (this._bytes > MAX_REQUEST_BYTES) throw new Error(`a request of more than ${MAX_REQUEST_BYTES} bytes`);
  }
}

function answer(response) {
  const bytes = Buffer.from(`${JSON.stringify(response)}\n`);
  for (let done = 0; done < bytes.length; ) done += fs.writeSync(1, bytes, done);
}

function perform(startup, request) {
  if (request.sandboxDir) {
    return { exitCode: 1, output: 'typescript worker: sandboxDir is set, and this worker does not support it\n' };
  }
  const digests = new Map();
  for (const input of request.inputs ?? []) {
    if (input.path && input.digest) digests.set(path.resolve(input.path), input.digest);
  }
  try {
    return compile([...startup, ...(request.arguments ?? [])], digests);
  } catch (broken) {
    return { exitCode: BROKEN, output: `typescript worker: ${broken.stack ?? broken}\n` };
  }
}

function serve(startup) {
  // From here on nothing but answers may get to standard output: one stray line would end the build.
  Object.defineProperty(process, 'stdout', { get: () => process.stderr });
  globalThis.console = new console.Console(process.stderr, process.stderr);
  const objects = new Objects((request) => {
    // A cancel comes, if at all, when its request has been answered: that race is allowed for, and ends here.
    if (request.cancel) return;
    answer({ requestId: request.requestId ?? 0, ...perform(startup, request) });
  });
  process.stdin.on('data', (chunk) => {
    try {
      objects.feed(chunk);
    } catch (error) {
      console.error(`typescript worker: standard input is not the worker protocol in JSON: ${error.message}`);
      process.exit(1);
    }
  });
  process.stdin.on('end', () => process.exit(0));
}

const words = process.argv.slice(2);
if (words.includes(PERSISTENT)) {
  serve(words.filter((word) => word !== PERSISTENT));
} else {
  const { exitCode, output } = compile(words, new Map());
  process.stdout.write(output);
  process.exitCode = exitCode;
}
