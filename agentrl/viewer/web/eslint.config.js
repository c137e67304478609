import svelte from 'eslint-plugin-svelte'
import ts from 'typescript-eslint'

export default ts.config(
  { ignores: ['node_modules/', 'mock/', 'scripts/'] },
  ...ts.configs.recommended,
  ...svelte.configs.recommended,
  {
    files: ['**/*.svelte', '**/*.svelte.ts'],
    languageOptions: { parserOptions: { parser: ts.parser } },
  },
  {
    rules: {
      // What a model wrote is text, never HTML.
      'svelte/no-at-html-tags': 'error',
      'no-restricted-properties': ['error', ...['innerHTML', 'outerHTML', 'insertAdjacentHTML'].map((property) => ({ property, message: 'what a model wrote is text, never HTML' }))],
      'no-restricted-globals': ['error', 'eval', 'Function'],
      // A style attribute would break the policy of the page; `style:` directives go through the CSSOM.
      'no-restricted-syntax': ['error', { selector: "SvelteAttribute[key.name='style']", message: 'use a class or a style: directive' }],
      // Routing is in the hash and plain anchors do it; keyed lists and reactive built-ins are chosen by hand.
      'svelte/no-navigation-without-resolve': 'off',
      'svelte/require-each-key': 'off',
      'svelte/prefer-svelte-reactivity': 'off',
      '@typescript-eslint/no-explicit-any': 'off',
      '@typescript-eslint/no-unused-expressions': 'off',
    },
  },
)
