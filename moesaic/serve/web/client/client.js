/** Client and Stream: build requests, send them, retry, and return answers complete or piece by piece. */

import { Connection } from "./connection.js";
import { ConnectionFailed, InvalidParameter } from "./errors.js";
import { parse, parseAnswer, parseEmbeddings, parseModels, parseTokens } from "./responses.js";
import { ResumableStream } from "./resume.js";
import { Attempts, sleep } from "./retry.js";

const DEFAULT_URL = "http://127.0.0.1:8000";
const RETRIES = { tries: 4, resumes: 12, seconds: 120, first: 0.5, longest: 8 };
const TIMEOUTS = { firstByte: 600, silence: 60 };

const FIELDS = [
  "model max_tokens temperature top_p top_k min_p typical_p repetition_penalty frequency_penalty presence_penalty",
  "bad_words allowed_token_ids truncate_prompt_tokens",
  "logit_bias seed n stop stop_token_ids min_tokens ignore_eos speculation logprobs response_format structured_outputs priority user",
].flatMap((line) => line.split(" "));
const CLIENT_OPTIONS = ["stream", "signal", "extra"];
const CHAT_OPTIONS = new Set([
  ...FIELDS,
  ...CLIENT_OPTIONS,
  "tools",
  "tool_choice",
  "parallel_tool_calls",
  "continue_final_message",
]);
const COMPLETE_OPTIONS = new Set([...FIELDS, ...CLIENT_OPTIONS, "echo", "best_of"]);

/** Client of one server; index.d.ts documents the methods. */
export class Client {
  #root;
  #headers;
  #model;
  #settings;

  /** @param {import("./index.d.ts").ClientOptions} [options] */
  constructor({ baseUrl, key, model, timeouts, retries, headers, fetch } = {}) {
    this.#root = rootOf(baseUrl || environment("MOESAIC_BASE_URL") || DEFAULT_URL);
    const apiKey = key || environment("MOESAIC_API_KEY");
    if (apiKey && !/^[!-~]+$/.test(apiKey)) {
      throw new InvalidParameter("key", "contains invalid characters; check for a line break at the end");
    }
    this.#headers = { accept: "application/json", ...(apiKey && { authorization: `Bearer ${apiKey}` }), ...headers };
    this.#model = model;
    this.#settings = {
      retries: { ...RETRIES, ...(retries?.tries === 1 && { resumes: 1 }), ...retries },
      timeouts: { ...TIMEOUTS, ...timeouts },
      fetch: fetch ?? globalThis.fetch,
    };
  }

  chat(messages, options = {}) {
    const { logprobs, ...fields } = checked(options, CHAT_OPTIONS);
    if (logprobs !== undefined) Object.assign(fields, { logprobs: true, top_logprobs: logprobs });
    const turns = typeof messages === "string" ? [{ role: "user", content: messages }] : messages;
    return this.#answer("/v1/chat/completions", { messages: turns, ...fields }, options);
  }

  complete(prompt, options = {}) {
    return this.#answer("/v1/completions", { prompt, ...checked(options, COMPLETE_OPTIONS) }, options);
  }

  async models({ signal } = {}) {
    const request = { method: "GET", url: `${this.#root}/v1/models`, headers: this.#headers, signal };
    return parse(parseModels, (await exchange(this.#settings, request)).content);
  }

  async embed(texts, { model, dimensions, signal } = {}) {
    const request = this.#post("/v1/embeddings", { input: texts, model, dimensions }, signal);
    return parse(parseEmbeddings, (await exchange(this.#settings, request)).content);
  }

  async tokenize(text, { model, signal } = {}) {
    const fields = typeof text === "string" ? { prompt: text } : { messages: text };
    const request = this.#post("/tokenize", { ...fields, model }, signal);
    return parse(parseTokens, (await exchange(this.#settings, request)).content);
  }

  #answer(path, fields, { stream, signal, extra }) {
    const body = { ...fields, ...extra };
    if (!stream) return fetchAnswer(this.#settings, this.#post(path, body, signal));
    const request = this.#post(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
    return new Stream(this.#settings, { ...request, headers: { ...request.headers, accept: "text/event-stream" } });
  }

  #post(path, fields, signal) {
    const headers = { ...this.#headers, "content-type": "application/json", "idempotency-key": uuid() };
    const body = JSON.stringify({ ...(this.#model && { model: this.#model }), ...present(fields) }, requireFinite);
    return { method: "POST", url: this.#root + path, headers, body, signal };
  }
}

/** Async iterable of the pieces of an answer. The request is sent when the iteration begins. */
export class Stream {
  /** Headers of the latest response; null before the first one. @type {Headers | null} */
  headers = null;
  #settings;
  #request;
  #stream = new ResumableStream();
  #attempts;
  #controller = new AbortController();
  /** @type {Connection | null} */
  #connection = null;
  #pieces;

  constructor(settings, request) {
    this.#settings = settings;
    this.#request = { ...request, signal: this.#controller.signal };
    this.#attempts = new Attempts(settings.retries);
    this.#pieces = this.#run(request.signal);
  }

  /** The text of the first answer, as received until now. */
  get text() {
    return this.#stream.text;
  }

  /** Latest token counts that the server reported; null before the first ones. */
  get usage() {
    return this.#stream.usage;
  }

  /** Number of times that the connection broke and a new one continued the answer. */
  get resumed() {
    return this.#stream.resumed;
  }

  [Symbol.asyncIterator]() {
    return this.#pieces;
  }

  /** Reads the stream to its end and returns the complete answer. */
  async answer() {
    for (let step = await this.#pieces.next(); !step.done; step = await this.#pieces.next());
    return this.#stream.answer();
  }

  /** Stops reading and closes the connection. A pending read rejects with the reason. @param {any} [reason] */
  abort(reason) {
    this.#controller.abort(reason);
  }

  /** @param {AbortSignal | undefined} signal */
  async *#run(signal) {
    const abort = () => this.abort(signal?.reason);
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort, { once: true });
    try {
      while (!this.#stream.done) {
        await this.#connect();
        await this.#read();
        for (let piece = this.#stream.take(); piece !== undefined; piece = this.#stream.take()) yield piece;
      }
      // Read the end of the response, so that the next request can reuse the connection.
      await this.#connection?.read().catch(() => undefined);
    } finally {
      signal?.removeEventListener("abort", abort);
      this.#disconnect();
    }
  }

  #disconnect() {
    this.#connection?.close();
    this.#connection = null;
  }

  async #connect() {
    while (this.#connection === null) {
      const connection = new Connection(this.#request, this.#settings.timeouts, this.#settings.fetch);
      try {
        this.headers = await connection.open();
      } catch (error) {
        connection.close();
        await this.#waitAfter(error);
        continue;
      }
      this.#connection = connection;
      this.#stream.startConnection(this.headers);
      if (this.#stream.resumable) this.#attempts.accepted();
    }
  }

  async #read() {
    let chunk;
    try {
      chunk = await this.#connection.read();
      if (chunk === undefined) throw new ConnectionFailed("the stream ended before the answer was complete");
    } catch (error) {
      this.#disconnect();
      await this.#waitAfter(error);
      return;
    }
    if (this.#stream.feed(chunk)) this.#attempts.progress();
  }

  /** @param {any} error */
  async #waitAfter(error) {
    this.#request.signal.throwIfAborted();
    await sleep(this.#attempts.waitAfter(this.#stream.failure(error)), this.#request.signal);
  }
}

async function fetchAnswer(settings, request) {
  const { content, headers } = await exchange(settings, request);
  return { ...parse(parseAnswer, content), requestId: headers.get("x-request-id") };
}

/** Sends a request until it succeeds or the retry policy gives up. Returns the JSON and the headers. */
async function exchange(settings, request) {
  const attempts = new Attempts(settings.retries);
  while (true) {
    const connection = new Connection(request, settings.timeouts, settings.fetch);
    try {
      const headers = await connection.open();
      return { headers, content: await connection.json() };
    } catch (error) {
      request.signal?.throwIfAborted();
      await sleep(attempts.waitAfter(error), request.signal);
    } finally {
      connection.close();
    }
  }
}

/** Returns a base URL without `/v1`. @param {string} url */
function rootOf(url) {
  const root = url.replace(/\/+$/, "").replace(/\/v1$/, "");
  if (!/^https?:\/\/[^/]/.test(root)) throw new InvalidParameter("baseUrl", "expected http://HOST:PORT or https://HOST");
  return root;
}

/** Returns the API fields among the options. Misspelt names are refused because servers ignore unknown fields. */
function checked(options, allowed) {
  const unknown = Object.keys(options).find((name) => !allowed.has(name));
  if (unknown !== undefined) {
    throw new InvalidParameter(unknown, "unknown option; use `extra` for fields that only the server knows");
  }
  const fields = { ...options };
  for (const name of CLIENT_OPTIONS) delete fields[name];
  return present(fields);
}

const present = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined && value !== null));

/** Replacer for JSON.stringify, which would encode NaN and infinities as null. */
function requireFinite(name, value) {
  if (typeof value === "number" && !Number.isFinite(value)) throw new InvalidParameter(name, `JSON cannot represent ${value}`);
  return value;
}

const environment = (name) => globalThis.process?.env?.[name];

/** Returns a random UUID. Pages without TLS lack `crypto.randomUUID`, and Node 18 lacks the global `crypto`. */
function uuid() {
  const bytes = new Uint8Array(16);
  if (globalThis.crypto) crypto.getRandomValues(bytes);
  else bytes.forEach((_, index) => (bytes[index] = Math.random() * 256));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
