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
      'svelte/no-inline-styles': ['error', { allowTransitions: true }],
      // Routing is in the hash and plain anchors do it; keyed lists and reactive built-ins are chosen by hand.
      'svelte/no-navigation-without-resolve': 'off',
      'svelte/require-each-key': 'off',
      'svelte/prefer-svelte-reactivity': 'off',
      '@typescript-eslint/no-explicit-any': 'off',
      '@typescript-eslint/no-unused-expressions': 'off',
    },
  },
)
