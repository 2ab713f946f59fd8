/** One HTTP request over fetch and its response, with timeouts and aborts. This module does not retry. */

import { BadReply, ConnectionFailed, TimedOut } from "./errors.js";
import { responseError } from "./responses.js";

/** Longest delay of a timer in milliseconds; with a longer one, setTimeout fires at once. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/**
 * @typedef {{method: string, url: string, headers: Record<string, string>, body?: string, signal?: AbortSignal,
 *   keepalive?: boolean}} Request
 * @typedef {{firstByte: number, silence: number}} Timeouts
 */

export class Connection {
  #controller = new AbortController();
  #timedOut = false;
  #isJson = false;
  /** Removes the listener on the request's signal. @type {(() => void)} */
  #unlink = () => undefined;
  /** Rejects the pending wait. @type {(reason: any) => void} */
  #rejectWait = () => undefined;
  /** @type {ReadableStreamDefaultReader<Uint8Array> | undefined} */
  #reader;

  /** @param {Request} request @param {Timeouts} timeouts @param {typeof fetch} fetch */
  constructor(request, timeouts, fetch) {
    this.request = request;
    this.timeouts = timeouts;
    this.fetch = fetch;
  }

  /**
   * Sends the request and returns the response headers. A status other than 200 is thrown as an error.
   * @returns {Promise<Headers>}
   */
  async open() {
    const { signal, url, ...init } = this.request;
    if (signal) {
      signal.throwIfAborted();
      const abort = () => this.#abort(signal.reason);
      signal.addEventListener("abort", abort, { once: true });
      this.#unlink = () => signal.removeEventListener("abort", abort);
    }
    const { fetch } = this; // browsers refuse fetch as a method of another object
    const response = await this.#withTimeout(this.timeouts.firstByte, false, () =>
      fetch(url, { ...init, signal: this.#controller.signal, credentials: "omit", cache: "no-store", redirect: "error" }),
    );
    this.#reader = response.body?.getReader();
    this.#isJson = /^application\/json/i.test(response.headers.get("content-type") ?? "");
    if (response.status !== 200) throw responseError(response.status, response.headers, await this.text());
    return response.headers;
  }

  /** Returns the next chunk of the body; undefined at its end. */
  async read() {
    const reader = this.#reader;
    if (reader === undefined) return undefined;
    const { done, value } = await this.#withTimeout(this.timeouts.silence, true, () => reader.read());
    return done ? undefined : value;
  }

  /** Returns the rest of the body as text. */
  async text() {
    const decoder = new TextDecoder();
    let text = "";
    for (let chunk = await this.read(); chunk !== undefined; chunk = await this.read()) {
      text += decoder.decode(chunk, { stream: true });
    }
    return text + decoder.decode();
  }

  /** Returns the rest of the body, parsed as JSON. */
  async json() {
    const text = await this.text();
    try {
      return JSON.parse(text);
    } catch {
      // With "connection: close", Node's fetch takes a truncated response for a complete one.
      if (this.#isJson) throw new ConnectionFailed(`${this.request.url}: the connection broke in the middle of the response`);
      throw new BadReply("the response is not valid JSON; check that baseUrl points to a Moesaic server");
    }
  }

  /** Closes the connection; the server stops computing. */
  close() {
    this.#unlink();
    this.#abort();
  }

  /**
   * Aborts the request and rejects the pending wait. The signal of fetch alone is not enough: after the response has
   * begun, Node's fetch loses the signal when garbage is collected.
   * @param {any} [reason]
   */
  #abort(reason) {
    this.#controller.abort(reason);
    this.#reader?.cancel(this.#controller.signal.reason).catch(() => undefined);
    this.#rejectWait(this.#controller.signal.reason);
  }

  /**
   * @template T
   * @param {number} seconds
   * @param {boolean} begun whether the response headers had arrived
   * @param {() => Promise<T>} work
   */
  async #withTimeout(seconds, begun, work) {
    const expire = () => {
      this.#timedOut = true;
      this.#abort();
    };
    const aborted = new Promise((_, reject) => (this.#rejectWait = reject));
    const timer = Number.isFinite(seconds) ? setTimeout(expire, Math.min(seconds * 1000, MAX_TIMER_MS)) : undefined;
    try {
      return await Promise.race([aborted, work()]);
    } catch (error) {
      throw this.#connectionError(error, begun);
    } finally {
      this.#rejectWait = () => undefined;
      clearTimeout(timer);
    }
  }

  /** @param {any} error @param {boolean} begun */
  #connectionError(error, begun) {
    this.#unlink();
    if (this.#timedOut && begun) return new ConnectionFailed("the server stopped sending in the middle of its answer");
    // Node's fetch has a timeout of its own, of five minutes.
    if (this.#timedOut || error.cause?.code === "UND_ERR_HEADERS_TIMEOUT") {
      return new TimedOut("the server did not respond in time; timeouts.firstByte sets the limit");
    }
    if (this.#controller.signal.aborted) return this.#controller.signal.reason;
    const reason = error.cause?.message || error.message;
    const problem = begun
      ? "the connection broke"
      : "cannot connect; check that the server is running and that it allows the origin of this page";
    return new ConnectionFailed(`${this.request.url}: ${problem} (${reason})`, { cause: error });
  }
}
