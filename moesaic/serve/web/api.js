/**
 * The page's requests to the server, through the JavaScript client in client/. This module knows neither
 * conversations nor the page.
 */

import { Connection } from "./client/connection.js";
import { BadReply, Client, ConnectionFailed, MoesaicError, StreamBroken } from "./client/index.js";

/**
 * @typedef {import("./client/index.js").Usage} Usage
 * @typedef {{id: string, context: number | null, state: string, parent: string | null, description: string}} Model
 *   `parent` is the model of a preset; null: this is a model
 * @typedef {{text: string, reason: string | null, usage: Usage | null}} Piece `reason` is the finish reason
 */

// Relative to this file, so that the page also works behind a proxy that adds a path prefix.
const ROOT = new URL("../", import.meta.url);
// The reader can stop an answer, so the page waits for its first byte without a limit.
const TIMEOUTS = { firstByte: Infinity, silence: 60 };
// The page shows the first error at once. It resumes an answer that has begun for a minute, while a gateway restarts.
const RETRIES = { tries: 1, resumes: 60, seconds: 60, first: 0.5, longest: 2 };

/** @param {string} key */
const clientFor = (key) => new Client({ baseUrl: ROOT.href, key, timeouts: TIMEOUTS, retries: RETRIES });

/**
 * Sends a request and returns the JSON of the response.
 * @param {string} method
 * @param {string} path below the server's root
 * @param {string} key
 * @param {{body?: unknown, keepalive?: boolean}} [options] `keepalive`: finish the request even if the page is closed
 * @returns {Promise<any>}
 */
export async function send(method, path, key, { body, keepalive = false } = {}) {
  const url = new URL(path, ROOT).href;
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const connection = new Connection({ method, url, headers, keepalive, body: JSON.stringify(body) }, TIMEOUTS, fetch);
  try {
    await connection.open();
    return await connection.json();
  } finally {
    connection.close();
  }
}

/**
 * Returns the message to show for an error.
 * @param {unknown} error
 * @returns {string}
 */
export function describe(error) {
  if (error instanceof StreamBroken) return "The connection broke before the answer was complete.";
  if (error instanceof ConnectionFailed) return "The server cannot be reached.";
  if (error instanceof BadReply) return "The server's response is invalid.";
  const { message } = /** @type {Error} */ (error);
  const wait = error instanceof MoesaicError ? error.retryAfter : null;
  return wait === null ? message : `${message.replace(/[.!?]?$/, ".")} Try again in ${Math.ceil(wait)} s.`;
}

/**
 * Returns the chat models that the server offers.
 * @param {string} key
 * @returns {Promise<Model[]>}
 */
export async function listModels(key) {
  const models = await clientFor(key).models();
  return models
    .filter(({ task }) => task === "chat")
    .map(({ raw, ...model }) => ({ ...model, parent: raw.parent ?? null, description: raw.description ?? "" }));
}

/**
 * Requests an answer and yields its pieces. Aborting `signal` ends the generation on the server too.
 *
 * A gateway runs the request as a job. It keeps the job for a while after the connection breaks, so that the client can
 * resume it. The job is therefore deleted when the reader stops the answer or leaves the page.
 * @param {Record<string, unknown>} fields
 * @param {string} key
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Piece, void, void>}
 */
export async function* streamChat({ messages, ...fields }, key, signal) {
  const stream = clientFor(key).chat(/** @type {any} */ (messages), { stream: true, signal, extra: fields });
  const deleteJob = () => {
    const job = stream.headers?.get("X-Moesaic-Job");
    if (job) send("DELETE", `v1/jobs/${encodeURIComponent(job)}`, key, { keepalive: true }).catch(() => undefined);
  };
  window.addEventListener("pagehide", deleteJob);
  try {
    for await (const { text, reason } of stream) yield { text, reason, usage: stream.usage };
    yield { text: "", reason: null, usage: stream.usage }; // the last event brings the final token counts
  } finally {
    window.removeEventListener("pagehide", deleteJob);
    if (signal.aborted) deleteJob();
  }
}
