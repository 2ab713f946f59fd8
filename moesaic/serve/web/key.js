/** Asks for the API key. */

import { byId } from "./dom.js";
import { readKey, writeKey } from "./preferences.js";

/**
 * Returns whether the reader has given one.
 * @param {string} reason
 * @param {string} [name] which key, as preferences.js has it
 * @returns {Promise<boolean>}
 */
export function askKey(reason, name) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
  if (dialog.open) return Promise.resolve(false); // several requests can be refused at once
  const input = /** @type {HTMLInputElement} */ (byId("key"));
  const remember = /** @type {HTMLInputElement} */ (byId("key-remember"));
  byId("key-reason").textContent = reason;
  input.value = readKey(name);
  dialog.showModal();
  input.select();
  return new Promise((resolve) => {
    let given = false;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      given = true;
      writeKey(input.value.trim(), remember.checked, name);
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = "";
      resolve(given);
    };
  });
}
