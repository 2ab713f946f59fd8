/**
 * The server's API: which models there are, and answers as they come.
 * Knows HTTP and the OpenAI dialect; knows no conversation and no page.
 */

import { EventParser } from "./sse.js";

/**
 * @typedef {{id: string, context: number | null, state: string}} Model
 * @typedef {{prompt_tokens: number, completion_tokens: number}} Usage
 * @typedef {{text: string, finish: string | null, usage: Usage | null}} Piece
 */

// Relative to this file, so that the page also works below a proxy's path prefix.
const BASE = new URL("../v1/", import.meta.url);

const PATIENCE = 60_000;
const PAUSE = 500;
/** Statuses with which an answer that is kept may yet go on: no connection, or nobody behind a proxy. */
const PASSING = new Set([0, 502, 503, 504]);

/** Something the server refused or could not do; `message` is for the reader. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status HTTP status; 0: there was no answer, or it broke off
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** @param {string} key @returns {Record<string, string>} */
const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** @param {string} path @param {RequestInit} options @returns {Promise<Response>} */
const request = (path, options) => ask(new URL(path, BASE), options);

/**
 * Asks the server for something; a refusal is thrown.
 * @param {URL} address
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 */
export async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, { credentials: "omit", cache: "no-store", ...options });
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** @param {Response} response @returns {Promise<ApiError>} */
async function refusal(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // A proxy's page instead of the API's JSON: the status has to do.
  }
  const wait = response.headers.get("Retry-After");
  if (wait && /^\d+$/.test(wait)) message += ` Try again in ${wait} s.`;
  return new ApiError(message, response.status);
}

/**
 * Returns the models that can be talked to.
 * @param {string} key
 * @returns {Promise<Model[]>}
 */
export async function listModels(key) {
  const response = await request("models", { headers: authorization(key) });
  /** @type {any} */
  let body;
  try {
    body = await response.json();
  } catch {
    throw new ApiError("The server's list of models cannot be read.", response.status);
  }
  if (!Array.isArray(body?.data)) throw new ApiError("The server's list of models cannot be read.", response.status);
  return body.data
    .filter((/** @type {any} */ model) => typeof model?.id === "string" && (model.task ?? "chat") === "chat")
    .map((/** @type {any} */ model) => ({
      id: model.id,
      context: Number.isInteger(model.max_model_len) ? model.max_model_len : null,
      state: typeof model.state === "string" ? model.state : "loaded",
    }));
}

/**
 * Asks for an answer and yields it piece by piece. Aborting `signal` ends the generation on the server too.
 *
 * A gateway keeps the request under a number: where the connection breaks, it is asked again and goes on.
 * @param {Record<string, unknown>} body
 * @param {string} key
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Piece, void, void>}
 */
export async function* streamChat(body, key, signal) {
  const headers = { Accept: "text/event-stream", "Idempotency-Key": newName(), ...authorization(key) };
  const text = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const options = { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body: text, signal };
  let job = /** @type {string | null} */ (null);
  let told = "";
  let brokenAt = 0;
  const leave = () => job !== null && withdraw(job, key);
  window.addEventListener("pagehide", leave); // else it would be kept for a while for somebody who comes again
  try {
    while (true) {
      try {
        const response = await request("chat/completions", options);
        job = response.headers.get("X-Moesaic-Job");
        let seen = 0; // characters that this connection has told
        for await (const piece of pieces(response.body)) {
          const known = told.slice(seen, seen + piece.text.length);
          if (!piece.text.startsWith(known)) throw new ApiError("The connection broke off, the answer is lost.", 500);
          const fresh = piece.text.slice(known.length);
          seen += piece.text.length;
          told += fresh;
          if (fresh) brokenAt = 0;
          yield { ...piece, text: fresh };
        }
        return;
      } catch (error) {
        const passing = error instanceof ApiError && PASSING.has(error.status);
        if (signal.aborted || job === null || !passing) throw error;
        brokenAt ||= performance.now();
        if (performance.now() - brokenAt > PATIENCE) throw error;
        await pause(signal);
      }
    }
  } finally {
    window.removeEventListener("pagehide", leave);
    if (signal.aborted) leave();
  }
}

/** A name for a request. `crypto.randomUUID` is not there on pages that came over plain HTTP. */
const newName = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("-");

/**
 * Takes a request back. Where that fails, the gateway does so itself after a while, as nobody reads the answer.
 * @param {string} job
 * @param {string} key
 */
const withdraw = (job, key) =>
  request(`jobs/${encodeURIComponent(job)}`, { method: "DELETE", headers: authorization(key), keepalive: true }).catch(() => undefined);

/** @param {AbortSignal} signal @returns {Promise<void>} ends at once where that is aborted */
const pause = (signal) =>
  new Promise((resolve) => {
    signal.addEventListener("abort", () => resolve(), { once: true });
    setTimeout(resolve, PAUSE);
  });

/**
 * Yields the pieces that a connection tells.
 * @param {ReadableStream<Uint8Array> | null} body
 * @returns {AsyncGenerator<Piece, void, void>}
 */
async function* pieces(body) {
  if (body === null) throw new ApiError("The server's answer is empty.");
  let finished = false;
  for await (const data of events(body)) {
    if (data === "[DONE]") return;
    const piece = readPiece(data);
    finished ||= piece.finish !== null;
    yield piece;
  }
  if (!finished) throw new ApiError("The connection broke off before the answer was complete.");
}

/**
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string, void, void>}
 */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // carries a character that is split between two pieces
  const parser = new EventParser();
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") throw error;
    throw new ApiError("The connection broke off before the answer was complete.");
  } finally {
    await reader.cancel().catch(() => undefined); // reached early when the consumer stops reading
  }
}

/**
 * Reads one event of a streamed answer.
 * @param {string} data
 * @returns {Piece}
 */
export function readPiece(data) {
  /** @type {any} */
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that cannot be read.", 500);
  }
  if (chunk?.error) {
    const { message = "The server ended the answer with an error.", code } = chunk.error;
    throw new ApiError(String(message), Number.isInteger(code) ? code : 500);
  }
  const choice = chunk?.choices?.[0];
  const text = choice?.delta?.content;
  const usage = chunk?.usage;
  return {
    text: typeof text === "string" ? text : "",
    finish: typeof choice?.finish_reason === "string" ? choice.finish_reason : null,
    usage: Number.isInteger(usage?.prompt_tokens) && Number.isInteger(usage?.completion_tokens) ? usage : null,
  };
}
