/** The client: what is asked, and answers whole or as they come. */

import { Connection } from "./connection.js";
import { ConnectionFailed, InvalidParameter } from "./errors.js";
import { answer, embeddings, models, read, tokens } from "./replies.js";
import { Course } from "./resuming.js";
import { Attempts, sleep } from "./retrying.js";

const DEFAULT_URL = "http://127.0.0.1:8000";
const RETRIES = { tries: 4, resumes: 12, seconds: 120, first: 0.5, longest: 8 };
const TIMEOUTS = { firstByte: 600, silence: 60 };

const FIELDS = [
  "model max_tokens temperature top_p top_k min_p typical_p repetition_penalty frequency_penalty presence_penalty",
  "logit_bias seed n stop stop_token_ids min_tokens ignore_eos logprobs response_format structured_outputs priority user",
].flatMap((line) => line.split(" "));
const OURS = ["stream", "signal", "extra"];
const CHAT = new Set([...FIELDS, ...OURS, "tools", "tool_choice", "parallel_tool_calls", "continue_final_message"]);
const COMPLETE = new Set([...FIELDS, ...OURS, "echo", "best_of"]);

/** A server to ask; index.d.ts has what each call takes and gives. */
export class Client {
  #root;
  #headers;
  #model;
  #wire;

  /** @param {import("./index.d.ts").ClientOptions} [options] */
  constructor({ baseUrl, key, model, timeouts, retries, headers, fetch } = {}) {
    this.#root = rootOf(baseUrl || environment("MOESAIC_BASE_URL") || DEFAULT_URL);
    const secret = key || environment("MOESAIC_API_KEY");
    if (secret && !/^[!-~]+$/.test(secret)) {
      throw new InvalidParameter("key", "holds what no key can: is there a line break at its end?");
    }
    this.#headers = { accept: "application/json", ...(secret && { authorization: `Bearer ${secret}` }), ...headers };
    this.#model = model;
    this.#wire = {
      retries: { ...RETRIES, ...retries },
      timeouts: { ...TIMEOUTS, ...timeouts },
      fetch: fetch ?? globalThis.fetch,
    };
  }

  chat(messages, options = {}) {
    const { logprobs, ...fields } = checked(options, CHAT);
    if (logprobs !== undefined) Object.assign(fields, { logprobs: true, top_logprobs: logprobs });
    const said = typeof messages === "string" ? [{ role: "user", content: messages }] : messages;
    return this.#answer("/v1/chat/completions", { messages: said, ...fields }, options);
  }

  complete(prompt, options = {}) {
    return this.#answer("/v1/completions", { prompt, ...checked(options, COMPLETE) }, options);
  }

  async models({ signal } = {}) {
    const ask = { method: "GET", url: `${this.#root}/v1/models`, headers: this.#headers, signal };
    return read(models, (await reply(this.#wire, ask)).value);
  }

  async embed(texts, { model, dimensions, signal } = {}) {
    const ask = this.#post("/v1/embeddings", { input: texts, model, dimensions }, signal);
    return read(embeddings, (await reply(this.#wire, ask)).value);
  }

  async tokenize(text, { model, signal } = {}) {
    const said = typeof text === "string" ? { prompt: text } : { messages: text };
    return read(tokens, (await reply(this.#wire, this.#post("/tokenize", { ...said, model }, signal))).value);
  }

  #answer(path, fields, { stream, signal, extra }) {
    const body = { ...fields, ...extra };
    if (!stream) return whole(this.#wire, this.#post(path, body, signal));
    const ask = this.#post(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
    return new Stream(this.#wire, { ...ask, headers: { ...ask.headers, accept: "text/event-stream" } });
  }

  #post(path, fields, signal) {
    const headers = { ...this.#headers, "content-type": "application/json", "idempotency-key": uuid() };
    const body = JSON.stringify({ ...(this.#model && { model: this.#model }), ...present(fields) }, finite);
    return { method: "POST", url: this.#root + path, headers, body, signal };
  }
}

/** An answer as it comes: an async iterable of pieces. It is asked for when that begins. */
export class Stream {
  #wire;
  #ask;
  #course = new Course();
  #attempts;
  #controller = new AbortController();
  /** @type {Connection | null} */
  #connection = null;
  #pieces;

  constructor(wire, ask) {
    this.#wire = wire;
    this.#ask = { ...ask, signal: this.#controller.signal };
    this.#attempts = new Attempts(wire.retries);
    this.#pieces = this.#run(ask.signal);
  }

  /** What has come so far, of the first answer if there are several. */
  get text() {
    return this.#course.text;
  }

  /** How often the connection broke and another one went on. */
  get resumed() {
    return this.#course.resumed;
  }

  [Symbol.asyncIterator]() {
    return this.#pieces;
  }

  /** Returns the whole answer; what has not come yet is waited for. */
  async answer() {
    for (let step = await this.#pieces.next(); !step.done; step = await this.#pieces.next());
    return this.#course.answer();
  }

  /** Takes no more of it: whoever waits for the next piece gets the reason. @param {any} [reason] */
  abort(reason) {
    this.#controller.abort(reason);
  }

  /** @param {AbortSignal | undefined} signal */
  async *#run(signal) {
    const abort = () => this.abort(signal?.reason);
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort, { once: true });
    try {
      while (!this.#course.done) {
        await this.#connect();
        await this.#read();
        for (let piece = this.#course.take(); piece !== undefined; piece = this.#course.take()) yield piece;
      }
      // The end of the response leaves its connection to the next request.
      await this.#connection?.read().catch(() => undefined);
    } finally {
      signal?.removeEventListener("abort", abort);
      this.#hangUp();
    }
  }

  #hangUp() {
    this.#connection?.close();
    this.#connection = null;
  }

  async #connect() {
    while (this.#connection === null) {
      const connection = new Connection(this.#ask, this.#wire.timeouts, this.#wire.fetch);
      let headers;
      try {
        headers = await connection.open();
      } catch (error) {
        connection.close();
        await this.#again(error);
        continue;
      }
      this.#connection = connection;
      this.#course.opened(headers);
    }
  }

  async #read() {
    let bytes;
    try {
      bytes = await this.#connection.read();
      if (bytes === undefined) throw new ConnectionFailed("the stream ended before the answer did");
    } catch (error) {
      this.#hangUp();
      await this.#again(error);
      return;
    }
    if (this.#course.feed(bytes)) this.#attempts.progress();
  }

  /** @param {any} error */
  async #again(error) {
    this.#ask.signal.throwIfAborted();
    await sleep(this.#attempts.waitAfter(this.#course.failed(error)), this.#ask.signal);
  }
}

async function whole(wire, ask) {
  const { value, headers } = await reply(wire, ask);
  return { ...read(answer, value), requestId: headers.get("x-request-id") };
}

async function reply(wire, ask) {
  const attempts = new Attempts(wire.retries);
  while (true) {
    const connection = new Connection(ask, wire.timeouts, wire.fetch);
    try {
      const headers = await connection.open();
      return { headers, value: await connection.json() };
    } catch (error) {
      ask.signal?.throwIfAborted();
      await sleep(attempts.waitAfter(error), ask.signal);
    } finally {
      connection.close();
    }
  }
}

/** Returns a server's address without `/v1`. @param {string} given */
function rootOf(given) {
  const root = given.replace(/\/+$/, "").replace(/\/v1$/, "");
  if (!/^https?:\/\/[^/]/.test(root)) throw new InvalidParameter("baseUrl", "expected http://HOST:PORT or https://HOST");
  return root;
}

/** Returns the API's fields among options, none of which is misspelt: the server would overlook it. */
function checked(options, known) {
  const unknown = Object.keys(options).find((name) => !known.has(name));
  if (unknown !== undefined) {
    throw new InvalidParameter(unknown, "is not known; what only the server knows goes into `extra`");
  }
  const fields = { ...options };
  for (const name of OURS) delete fields[name];
  return present(fields);
}

const present = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined && value !== null));
/** For JSON.stringify, which would write null. */
function finite(name, value) {
  if (typeof value === "number" && !Number.isFinite(value)) throw new InvalidParameter(name, `${value} is no number in JSON`);
  return value;
}

const environment = (name) => globalThis.process?.env?.[name];

/** A random UUID; `crypto.randomUUID` is missing in pages without TLS, and `crypto` in Node 18. */
function uuid() {
  const bytes = new Uint8Array(16);
  if (globalThis.crypto) crypto.getRandomValues(bytes);
  else bytes.forEach((_, place) => (bytes[place] = Math.random() * 256));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
