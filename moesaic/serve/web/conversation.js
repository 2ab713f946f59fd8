/** The data of a conversation, and the API request for its next answer. Independent of the page and of storage. */

import { requestFields } from "./sampling.js";

/**
 * @typedef {"stopped" | "length" | "failed"} Cut why an answer is incomplete: the reader stopped it or closed the page,
 *   it reached the token limit, or an error ended it
 * @typedef {{prompt: number, answer: number, rate: number | null}} Cost tokens, and tokens per second
 * @typedef {{role: "user" | "assistant", content: string, cut?: Cut, cost?: Cost, model?: string}} Message
 * @typedef {{id: string, revision: number, title: string, created: number, updated: number, model: string,
 *   system: string, settings: import("./sampling.js").Settings, messages: Message[]}} Conversation
 *   `revision` counts the saves; 0: never saved
 */

const MAX_TITLE_LENGTH = 60;

/** @returns {string} a random id; pages over plain HTTP have no `crypto.randomUUID` */
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
 * Returns a title made from the first message.
 * @param {string} text
 * @returns {string}
 */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  const characters = Array.from(line.slice(0, 2 * MAX_TITLE_LENGTH + 2)); // code points, so that no surrogate pair is split
  return characters.length <= MAX_TITLE_LENGTH ? line : `${characters.slice(0, MAX_TITLE_LENGTH).join("").trimEnd()}…`;
}

/**
 * Returns the request for the next answer, or for the continuation of the last message if it is the assistant's.
 * @param {Conversation} conversation
 * @returns {Record<string, unknown>}
 */
export function requestFor(conversation) {
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const continues = messages.at(-1)?.role === "assistant";
  return {
    model: conversation.model,
    messages: [...system, ...messages],
    ...requestFields(conversation.settings),
    ...(continues ? { continue_final_message: true, add_generation_prompt: false } : {}),
  };
}
