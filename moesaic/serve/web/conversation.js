/** What a conversation is, and what the API is asked for it. Knows neither page nor storage. */

import { fields } from "./sampling.js";

/**
 * @typedef {"stopped" | "length" | "failed"} Cut why an answer is not complete: the reader stopped it or closed
 *   the page, it reached the most new tokens, or something broke
 * @typedef {{prompt: number, answer: number, rate: number | null}} Cost tokens, and tokens per second
 * @typedef {{role: "user" | "assistant", content: string, cut?: Cut, cost?: Cost, model?: string}} Message
 * @typedef {{id: string, revision: number, title: string, created: number, updated: number, model: string,
 *   system: string, settings: import("./sampling.js").Settings, messages: Message[]}} Conversation
 *   `revision` counts what was stored of it; 0: nothing yet
 */

const TITLE = 60;

/** @returns {string} a name that no other conversation has, also where there is no `crypto.randomUUID` */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {Partial<Conversation>} [content]
 * @returns {Conversation}
 */
export function newConversation(content = {}) {
  const now = Date.now();
  return {
    title: "",
    created: now,
    updated: now,
    model: "",
    system: "",
    settings: {},
    messages: [],
    ...content,
    id: newId(),
    revision: 0,
  };
}

/**
 * Returns a title made of what was said first.
 * @param {string} text
 * @returns {string}
 */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  const characters = Array.from(line.slice(0, 2 * TITLE + 2)); // whole characters, not halves of a surrogate pair
  return characters.length <= TITLE ? line : `${characters.slice(0, TITLE).join("").trimEnd()}…`;
}

/**
 * Returns the body of the request for the next answer, or for more of the last one if that is the assistant's.
 * @param {Conversation} conversation
 * @returns {Record<string, unknown>}
 */
export function requestFor(conversation) {
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const goesOn = messages.at(-1)?.role === "assistant";
  return {
    model: conversation.model,
    messages: [...system, ...messages],
    ...fields(conversation.settings),
    ...(goesOn ? { continue_final_message: true, add_generation_prompt: false } : {}),
  };
}
