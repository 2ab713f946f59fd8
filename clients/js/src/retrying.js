/**
 * When to ask again, and when to give up. Every request carries a key by which a server can tell a repetition,
 * and repeating a question harms nobody even where it cannot.
 */

import { BadReply, ConnectionFailed } from "./errors.js";

/** Statuses that may be another one soon; others from 500 on are only if the server says when to come again. */
const PASSING = new Set([408, 409, 429, 502, 503]);

/** @param {any} error */
export function passing(error) {
  if (error instanceof BadReply) return false;
  if (error instanceof ConnectionFailed || PASSING.has(error.status)) return true;
  return error.status >= 500 && error.retryAfter !== null && error.retryAfter !== undefined;
}

/** The tries of one request. */
export class Attempts {
  #failed = 0;
  #begun = false;
  #since = 0;

  /** @param {import("./index.d.ts").Retries} retries */
  constructor(retries, clock = () => performance.now() / 1000, draw = Math.random) {
    this.retries = retries;
    this.clock = clock;
    this.draw = draw;
  }

  /** Begins to count anew: the last try has brought something. */
  progress() {
    this.#failed = 0;
    this.#begun = true;
  }

  /**
   * Returns how many seconds to wait before the next try; full jitter, on top of what the server says.
   * Throws that very error where it would come again, or where there were tries enough.
   * @param {any} error
   */
  waitAfter(error) {
    const { tries, resumes, seconds, first, longest } = this.retries;
    const most = this.#begun && tries > 1 ? resumes : tries;
    const now = this.clock();
    if (this.#failed === 0) this.#since = now;
    this.#failed += 1;
    const wait = this.draw() * Math.min(longest, first * 2 ** (this.#failed - 1)) + (error.retryAfter ?? 0);
    if (!passing(error) || this.#failed >= most || now + wait - this.#since > seconds) throw error;
    return wait;
  }
}

/**
 * Waits; an abort ends it at once.
 * @param {number} seconds
 * @param {AbortSignal | undefined} signal
 */
export function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve(undefined);
    }, seconds * 1000);
    if (signal?.aborted) end();
    signal?.addEventListener("abort", end, { once: true });
  });
}
