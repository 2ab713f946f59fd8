/** One request over fetch, and its response. Knows time and aborts; decides nothing about other tries. */

import { BadReply, ConnectionFailed, TimedOut } from "./errors.js";
import { failure } from "./replies.js";

/** Milliseconds; with more, timers end at once. */
const LONGEST = 2 ** 31 - 1;

/**
 * @typedef {{method: string, url: string, headers: Record<string, string>, body?: string, signal?: AbortSignal}} Ask
 * @typedef {{firstByte: number, silence: number}} Timeouts
 */

export class Connection {
  #controller = new AbortController();
  #timedOut = false;
  #json = false;
  /** @type {(() => void)} */
  #unlink = () => undefined;
  /** Ends what is waited for. @type {(reason: any) => void} */
  #wake = () => undefined;
  /** @type {ReadableStreamDefaultReader<Uint8Array> | undefined} */
  #reader;

  /** @param {Ask} ask @param {Timeouts} timeouts @param {typeof fetch} fetch */
  constructor(ask, timeouts, fetch) {
    this.ask = ask;
    this.timeouts = timeouts;
    this.fetch = fetch;
  }

  /**
   * Sends the request and returns the head of its response, which says 200.
   * @returns {Promise<Headers>}
   */
  async open() {
    const { signal, url, ...init } = this.ask;
    if (signal) {
      signal.throwIfAborted();
      const abort = () => this.#abort(signal.reason);
      signal.addEventListener("abort", abort, { once: true });
      this.#unlink = () => signal.removeEventListener("abort", abort);
    }
    const { fetch } = this; // which must not be called as a method
    const response = await this.#within(this.timeouts.firstByte, false, () =>
      fetch(url, { ...init, signal: this.#controller.signal, credentials: "omit", cache: "no-store", redirect: "error" }),
    );
    this.#reader = response.body?.getReader();
    this.#json = /^application\/json/i.test(response.headers.get("content-type") ?? "");
    if (response.status !== 200) throw failure(response.status, response.headers, await this.text());
    return response.headers;
  }

  /** Returns the next bytes; undefined: that was all. */
  async read() {
    const reader = this.#reader;
    if (reader === undefined) return undefined;
    const { done, value } = await this.#within(this.timeouts.silence, true, () => reader.read());
    return done ? undefined : value;
  }

  /** Returns the rest of the body as text. */
  async text() {
    const decoder = new TextDecoder();
    let text = "";
    for (let bytes = await this.read(); bytes !== undefined; bytes = await this.read()) {
      text += decoder.decode(bytes, { stream: true });
    }
    return text + decoder.decode();
  }

  /** Returns the rest of the body as a value. */
  async json() {
    const text = await this.text();
    try {
      return JSON.parse(text);
    } catch {
      // Node's fetch takes half a response for a whole one where the connection was to be closed after it.
      if (this.#json) throw new ConnectionFailed(`${this.ask.url}: the connection broke off in the middle of the answer`);
      throw new BadReply("the server's answer is no JSON: does baseUrl lead to something else?");
    }
  }

  /** Takes no more of it: the server stops computing. */
  close() {
    this.#unlink();
    this.#abort();
  }

  /**
   * Ends the request, and whoever waits for it. Node's fetch alone cannot be relied on: it forgets the signal of a
   * request whose response has begun, when garbage is collected.
   * @param {any} [reason]
   */
  #abort(reason) {
    this.#controller.abort(reason);
    this.#reader?.cancel(this.#controller.signal.reason).catch(() => undefined);
    this.#wake(this.#controller.signal.reason);
  }

  /**
   * @template T
   * @param {number} seconds
   * @param {boolean} begun whether the head of the response was there
   * @param {() => Promise<T>} work
   */
  async #within(seconds, begun, work) {
    const end = () => {
      this.#timedOut = true;
      this.#abort();
    };
    const ended = new Promise((_, reject) => (this.#wake = reject));
    const timer = Number.isFinite(seconds) ? setTimeout(end, Math.min(seconds * 1000, LONGEST)) : undefined;
    try {
      return await Promise.race([ended, work()]);
    } catch (error) {
      throw this.#lost(error, begun);
    } finally {
      this.#wake = () => undefined;
      clearTimeout(timer);
    }
  }

  /** @param {any} error @param {boolean} begun */
  #lost(error, begun) {
    this.#unlink();
    if (this.#timedOut && begun) return new ConnectionFailed("the server fell silent in the middle of its answer");
    // Node's fetch has bounds of its own, of five minutes.
    if (this.#timedOut || error.cause?.code === "UND_ERR_HEADERS_TIMEOUT") {
      return new TimedOut("the server did not begin to answer in time: timeouts.firstByte says how long to wait");
    }
    if (this.#controller.signal.aborted) return this.#controller.signal.reason;
    const reason = error.cause?.message || error.message;
    const more = begun ? "the connection broke off" : "no answer: does a server run there, and may this page ask it?";
    return new ConnectionFailed(`${this.ask.url}: ${more} (${reason})`, { cause: error });
  }
}
