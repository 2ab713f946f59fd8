/**
 * Export and import of conversations. The file of one conversation is the file format of `moesaic chat`:
 *
 *     {"moesaic": 1, "model": "...", "messages": [{"role": ..., "content": ...}, ...], "settings": {...}}
 *
 * A system prompt is the first message. The file of several conversations is {"moesaic": 1, "conversations": [...]};
 * each entry has the same fields, plus title and dates. Files are untrusted: each field is checked.
 */

import { newConversation, titleOf } from "./conversation.js";
import { validSettings } from "./sampling.js";

/** @typedef {import("./conversation.js").Conversation} Conversation @typedef {import("./conversation.js").Message} Message */

const VERSION = 1;
const ROLES = new Set(["user", "assistant"]);
const MAX_NAME_LENGTH = 200;

/** The file cannot be imported; `message` is for the reader. */
export class ImportError extends Error {}

/** @param {Conversation} conversation */
function portable({ system, messages, model, settings }) {
  const turns = messages.map(({ role, content }) => ({ role, content }));
  return { model, messages: system ? [{ role: "system", content: system }, ...turns] : turns, settings };
}

/** @param {Conversation} conversation @returns {string} the file's text */
export function exportOne(conversation) {
  return JSON.stringify({ moesaic: VERSION, ...portable(conversation) }, null, 1);
}

/** @param {Conversation[]} conversations @returns {string} the file's text */
export function exportAll(conversations) {
  const entries = conversations.map((conversation) => {
    const { title, created, updated } = conversation;
    return { title, created, updated, ...portable(conversation) };
  });
  return JSON.stringify({ moesaic: VERSION, conversations: entries }, null, 1);
}

/**
 * Returns the conversations in a file, with new ids.
 * @param {string} text
 * @returns {Conversation[]}
 */
export function readFile(text) {
  /** @type {any} */
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new ImportError("This file is not JSON, so it contains no conversations.");
  }
  if (body?.moesaic !== VERSION) throw new ImportError("This file contains no Moesaic conversations of version 1.");
  const entries = Object.hasOwn(body, "conversations") ? body.conversations : [body];
  if (!Array.isArray(entries)) throw new ImportError("This file is damaged: its conversations are not a list.");
  return entries.map((entry, index) => readOne(entry, `conversation ${index + 1}`));
}

/** @param {any} entry @param {string} where @returns {Conversation} */
function readOne(entry, where) {
  if (!Array.isArray(entry?.messages)) throw new ImportError(`This file is damaged: ${where} has no messages.`);
  const [system, ...rest] = entry.messages[0]?.role === "system" ? entry.messages : [null, ...entry.messages];
  if (system && typeof system.content !== "string") throw new ImportError(`This file is damaged: ${where}, system prompt.`);
  const messages = rest.map((/** @type {any} */ message, /** @type {number} */ index) => readMessage(message, `${where}, message ${index + 1}`));
  const title = typeof entry.title === "string" ? entry.title.slice(0, MAX_NAME_LENGTH) : "";
  return newConversation({
    title: title.trim() || titleOf(messages[0]?.content ?? "") || "Imported conversation",
    model: typeof entry.model === "string" ? entry.model.slice(0, MAX_NAME_LENGTH) : "",
    system: system?.content ?? "",
    settings: validSettings(typeof entry.settings === "object" && entry.settings !== null ? entry.settings : {}),
    messages,
    ...dates(entry),
  });
}

/** @param {any} message @param {string} where @returns {Message} */
function readMessage(message, where) {
  if (!ROLES.has(message?.role) || typeof message.content !== "string") {
    throw new ImportError(`This file is damaged: ${where} is not a message of the user or the assistant.`);
  }
  return { role: message.role, content: message.content };
}

/** @param {any} entry @returns {{created?: number, updated?: number}} the fields with valid dates */
function dates(entry) {
  const valid = ["created", "updated"].filter((name) => Number.isInteger(entry[name]) && !isNaN(new Date(entry[name]).getTime()));
  return Object.fromEntries(valid.map((name) => [name, entry[name]]));
}
