/**
 * Retry policy: which errors to retry, how long to wait, and when to give up. Repeating a request is safe: every
 * request carries an idempotency key, and a server that ignores the key computes the answer again.
 */

import { BadReply, ConnectionFailed } from "./errors.js";

/** Statuses that are retried. Other statuses from 500 on are retried only if the server sends Retry-After. */
const TRANSIENT_STATUSES = new Set([408, 409, 429, 502, 503]);

/** Returns whether the same request may succeed later. @param {any} error */
export function isTransient(error) {
  if (error instanceof BadReply) return false;
  if (error instanceof ConnectionFailed || TRANSIENT_STATUSES.has(error.status)) return true;
  return error.status >= 500 && error.retryAfter !== null && error.retryAfter !== undefined;
}

/** Counter of the tries of one request. */
export class Attempts {
  #failures = 0;
  #begun = false;
  #firstFailure = 0;

  /** @param {import("./index.d.ts").Retries} retries */
  constructor(retries, clock = () => performance.now() / 1000, draw = Math.random) {
    this.retries = retries;
    this.clock = clock;
    this.draw = draw;
  }

  /** Allows `resumes` tries from now on, because the server has accepted the request and can replay its answer. */
  accepted() {
    this.#begun = true;
  }

  /** Resets the count, because the last try brought new data. */
  progress() {
    this.#failures = 0;
    this.#begun = true;
  }

  /**
   * Returns the seconds to wait before the next try: full jitter, plus Retry-After.
   * Throws `error` itself if it is permanent or a limit is reached.
   * @param {any} error
   */
  waitAfter(error) {
    const { tries, resumes, seconds, first, longest } = this.retries;
    const maxTries = this.#begun ? resumes : tries;
    const now = this.clock();
    if (this.#failures === 0) this.#firstFailure = now;
    this.#failures += 1;
    const wait = this.draw() * Math.min(longest, first * 2 ** (this.#failures - 1)) + (error.retryAfter ?? 0);
    if (!isTransient(error) || this.#failures >= maxTries || now + wait - this.#firstFailure > seconds) throw error;
    return wait;
  }
}

/**
 * Waits; an abort rejects at once with the reason of the signal.
 * @param {number} seconds
 * @param {AbortSignal | undefined} signal
 */
export function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const abort = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", abort);
      resolve(undefined);
    }, seconds * 1000);
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort, { once: true });
  });
}
