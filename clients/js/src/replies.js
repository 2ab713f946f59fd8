/** What a server says, read: answers, pieces of answers, and errors. Knows the API's JSON, no connections. */

import * as errors from "./errors.js";

const BY_STATUS = new Map([
  [401, errors.Unauthorized],
  [403, errors.Forbidden],
  [404, errors.NotFound],
  [408, errors.TimedOut],
  [413, errors.TooLarge],
  [429, errors.Overloaded],
  [502, errors.Unavailable],
  [503, errors.Unavailable],
  [504, errors.TimedOut],
]);

/** @param {number} status @param {Headers} headers @param {string} body */
export function failure(status, headers, body) {
  let shown = null;
  try {
    shown = JSON.parse(body);
  } catch {
    // A proxy's page instead of the API's JSON: the status has to do.
  }
  const error = errorOf(status, shown);
  error.retryAfter = retryAfter(headers.get("retry-after"));
  error.requestId = headers.get("x-request-id");
  return error;
}

/** Returns the error that an event in a stream tells of. @param {any} shown */
export function eventError(shown) {
  const code = shown.error?.code;
  return errorOf(Number.isInteger(code) && code >= 400 && code < 600 ? code : 500, shown);
}

/** Reads an error in OpenAI's form or in TGI's. @param {number} status @param {any} shown */
function errorOf(status, shown) {
  const told = typeof shown?.error === "string" ? { message: shown.error } : (shown?.error ?? {});
  const message = String(told.message ?? `the server answered with status ${status}`);
  let error;
  if (status === 400 && typeof told.param === "string") {
    const head = `${told.param}: `;
    error = new errors.InvalidParameter(told.param, message.startsWith(head) ? message.slice(head.length) : message);
  } else {
    const other = status < 500 ? errors.InvalidRequest : errors.MoesaicError;
    error = new (BY_STATUS.get(status) ?? other)(message);
  }
  error.status = status;
  return error;
}

/** Returns the seconds of a Retry-After, which may be a date. @param {string | null} value */
export function retryAfter(value) {
  if (value === null) return null;
  const seconds = /^\d+(\.\d+)?$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}

/**
 * Returns what a reader makes of a value that is perhaps not of the API's shape.
 * @template T
 * @param {(value: any) => T} reader
 * @param {any} value
 */
export function read(reader, value) {
  try {
    return reader(value);
  } catch (error) {
    if (error instanceof errors.MoesaicError) throw error;
    throw new errors.BadReply(`the server's answer is not of OpenAI's shape (${error.message})`);
  }
}

/** @param {any} value */
function listed(value) {
  if (!Array.isArray(value)) throw new TypeError("a list is missing");
  return value;
}

/** Returns the answer of either API with its alternatives. @param {any} value */
export function answer(value) {
  const choices = [...listed(value.choices)].sort((a, b) => a.index - b.index);
  const [first, ...alternatives] = choices.map((choice) => {
    const message = choice.message ?? { content: choice.text };
    const calls = (message.tool_calls ?? []).map((call) => ({ id: call.id, ...call.function }));
    return answerOf({
      text: message.content ?? "",
      reason: String(choice.finish_reason),
      usage: value.usage ?? null,
      calls,
      logprobs: choice.logprobs ? logprobs(choice.logprobs) : null,
      raw: value,
    });
  });
  return { ...first, alternatives };
}

/** Completes an answer by what follows from the rest of it. @param {any} fields */
export function answerOf({ text, reason, usage, calls, logprobs, raw }) {
  const message = { role: "assistant", content: text };
  if (calls.length > 0) {
    message.tool_calls = calls.map(({ id, name, arguments: written }) => ({
      id,
      type: "function",
      function: { name, arguments: written },
    }));
  }
  const { id = "", model = "" } = raw;
  return { text, reason, usage, calls, logprobs, message, id, model, requestId: null, alternatives: [], raw };
}

/** Returns log-probabilities, in the form of chats or of completions. @param {any} value */
function logprobs(value) {
  if ("content" in value) {
    return (value.content ?? []).map(({ token, logprob, top_logprobs: top }) => ({
      token,
      logprob,
      top: (top ?? []).map((each) => ({ token: each.token, logprob: each.logprob })),
    }));
  }
  return value.tokens.map((token, place) => ({
    token,
    logprob: value.token_logprobs[place],
    top: Object.entries(value.top_logprobs?.[place] ?? {}).map(([other, logprob]) => ({ token: other, logprob })),
  }));
}

/** Returns what an event of either API brings. @param {any} chunk */
export function pieces(chunk) {
  return (chunk.choices ?? []).map((choice) => {
    const delta = choice.delta ?? { content: choice.text };
    return {
      text: delta.content ?? "",
      index: choice.index,
      calls: (delta.tool_calls ?? []).map((call) => ({
        place: call.index,
        id: call.id ?? "",
        name: call.function?.name ?? "",
        arguments: call.function?.arguments ?? "",
      })),
      logprobs: choice.logprobs ? logprobs(choice.logprobs) : [],
      reason: choice.finish_reason ?? null,
    };
  });
}

/** @param {any} value */
export function models(value) {
  return listed(value.data).map((raw) => ({
    id: raw.id,
    context: raw.max_model_len ?? null,
    task: raw.task ?? "chat",
    state: raw.state ?? "loaded",
    raw,
  }));
}

/** @param {any} value */
export function embeddings(value) {
  const rows = [...listed(value.data)].sort((a, b) => a.index - b.index);
  return { vectors: rows.map((row) => row.embedding), model: value.model, usage: value.usage ?? null, raw: value };
}

/** @param {any} value */
export function tokens(value) {
  return { ids: listed(value.tokens), texts: value.token_strs ?? [], context: value.max_model_len ?? null, raw: value };
}
