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

/** Something the server refused or could not do; `message` is for the reader. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status HTTP status; 0: the error came in mid-stream, or there was no answer at all
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
 * @param {Record<string, unknown>} body
 * @param {string} key
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Piece, void, void>}
 */
export async function* streamChat(body, key, signal) {
  const response = await request("chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...authorization(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (response.body === null) throw new ApiError("The server's answer is empty.");
  let finished = false;
  for await (const data of events(response.body)) {
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
    throw new ApiError("The server sent something that cannot be read.");
  }
  if (chunk?.error) throw new ApiError(String(chunk.error.message ?? "The server ended the answer with an error."));
  const choice = chunk?.choices?.[0];
  const text = choice?.delta?.content;
  const usage = chunk?.usage;
  return {
    text: typeof text === "string" ? text : "",
    finish: typeof choice?.finish_reason === "string" ? choice.finish_reason : null,
    usage: Number.isInteger(usage?.prompt_tokens) && Number.isInteger(usage?.completion_tokens) ? usage : null,
  };
}
