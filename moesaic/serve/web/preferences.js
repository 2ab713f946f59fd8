/** What this browser remembers beside conversations: the API key, the theme, the model used last and its settings. */

import { known } from "./sampling.js";

const KEY = "moesaic.key";
/** Where the key of an administrator is, which the chat never sends. */
export const ADMIN = "moesaic.admin-key";
const LAST = "moesaic.last";
const THEME = "moesaic.theme"; // theme.js reads it before the first paint

/**
 * Returns a storage of the browser, or null where the reader has forbidden it: then merely naming it throws.
 * @param {"localStorage" | "sessionStorage"} name
 * @returns {Storage | null}
 */
export function storage(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

/**
 * @param {Storage | null} area
 * @param {string} name
 * @param {string} value
 */
export function put(area, name, value) {
  try {
    area?.setItem(name, value);
  } catch {
    // It is full: what is kept here can be done without.
  }
}

/** @type {Map<string, string>} the keys of this page, for where nothing can be stored */
const current = new Map();

/** @param {string} [name] which key @returns {string} empty: there is none */
export function readKey(name = KEY) {
  return current.get(name) ?? storage("sessionStorage")?.getItem(name) ?? storage("localStorage")?.getItem(name) ?? "";
}

/**
 * Keeps the key until the tab is closed, or until it is replaced.
 * @param {string} key
 * @param {boolean} remember
 * @param {string} [name] which key it is
 */
export function writeKey(key, remember, name = KEY) {
  current.set(name, key);
  for (const area of [storage("sessionStorage"), storage("localStorage")]) area?.removeItem(name);
  if (key) put(storage(remember ? "localStorage" : "sessionStorage"), name, key);
}

/** @returns {{model: string, settings: import("./sampling.js").Settings}} what the next conversation begins with */
export function readLast() {
  try {
    const last = JSON.parse(storage("localStorage")?.getItem(LAST) ?? "{}");
    return { model: typeof last.model === "string" ? last.model : "", settings: known(last.settings ?? {}) };
  } catch {
    return { model: "", settings: {} };
  }
}

/** @param {import("./conversation.js").Conversation} conversation */
export function writeLast({ model, settings }) {
  put(storage("localStorage"), LAST, JSON.stringify({ model, settings }));
}

/** @returns {string} light, dark, or system */
export function readTheme() {
  return document.documentElement.dataset.theme ?? "system";
}

/** @param {string} theme */
export function writeTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  put(storage("localStorage"), THEME, theme);
}
